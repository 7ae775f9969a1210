// Shows the slides that a text and a state choose.
const rows = [...document.querySelectorAll("#slides tbody tr")];
const [text, kind, shown] = ["find", "kind", "shown"].map((id) => document.getElementById(id));
function filter() {
  const wanted = text.value.toLowerCase();
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted) || (kind.value !== "" && row.dataset.kind !== kind.value);
  }
  shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}
text.oninput = kind.onchange = filter;
filter();
if (location.protocol === "data:") { // inside Snakemake's report, which has the pictures themselves
  for (const gone of document.querySelectorAll('#gallery, .gallery, a[href="#gallery"]')) gone.remove();
  for (const link of document.querySelectorAll('a[href^="../"]')) link.replaceWith(...link.childNodes);
}
