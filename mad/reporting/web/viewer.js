// One slide in OpenSeadragon, its annotation and class maps above it. Coordinates are level-0 pixels of the slide unless told.
"use strict";

const { slide, classes } = JSON.parse(document.getElementById("page").textContent); // classes in the order of their priority
const colours = Object.fromEntries(classes);
const root = `../pyramids/${slide.slide_id}/slide_files/`;
const LAST_ZOOM = 8; // screen pixels per pixel of the picture
const BAR_PX = 160; // longest scale bar
const LINE_PX = 2.5; // of an outline
const CASING_PX = 1; // white on both sides of it: it shows on the darkest stain

const viewer = OpenSeadragon({
  id: "slide",
  drawer: "canvas",
  showNavigationControl: false,
  showNavigator: true,
  navigatorPosition: "TOP_RIGHT",
  navigatorSizeRatio: 0.15,
  navigatorBackground: "#eee",
  navigatorOpacity: 1,
  animationTime: 0.4,
  maxZoomPixelRatio: LAST_ZOOM,
  gestureSettingsMouse: { clickToZoom: false },
  tileSources: {
    width: slide.width,
    height: slide.height,
    tileSize: slide.tile_px,
    tileOverlap: slide.overlap,
    minLevel: Math.min(8, slide.thumbnail_level),
    getTileUrl: (level, column, row) => `${root}${level}/${column}_${row}.jpg`,
  },
});

// ---- places ----------------------------------------------------------------------------------------------------------------
const toPicture = (x, y) => new OpenSeadragon.Point((x - slide.left) / slide.downsample, (y - slide.top) / slide.downsample);
const toScreen = (x, y) => viewer.world.getItemAt(0).imageToViewerElementCoordinates(toPicture(x, y));
function toSlide(point) {
  const { x, y } = viewer.world.getItemAt(0).viewerElementToImageCoordinates(point);
  return [slide.left + x * slide.downsample, slide.top + y * slide.downsample];
}

// ---- layers on a canvas above the slide: pictures of a pixel per tile, enlarged without smoothing, and outlines --------------
const layers = slide.layers.map((told) => {
  const layer = { ...told, shown: false, opacity: 0, picture: null, pixels: null, paths: null };
  const folder = `../layers/${slide.slide_id}/`;
  if (told.picture) loadPicture(layer, folder + told.picture);
  else loadOutlines(layer, folder + told.geojson);
  return layer;
});

function loadPicture(layer, address) {
  layer.picture = new Image();
  layer.picture.onload = () => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [layer.picture.naturalWidth, layer.picture.naturalHeight];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(layer.picture, 0, 0);
    layer.pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    draw();
  };
  layer.picture.src = address;
}

/** Sets `paths`: one per class, counted from the picture's corner as the file is; the class that wins overlaps comes first. */
async function loadOutlines(layer, address) {
  const { features } = await (await fetch(address)).json();
  const paths = new Map(classes.map(([name]) => [name, new Path2D()]));
  for (const { geometry, properties } of features) {
    const path = paths.get(properties.classification.name);
    for (const ring of geometry.coordinates.flat(geometry.type === "Polygon" ? 0 : 1)) {
      ring.forEach(([x, y], number) => (number ? path.lineTo(x, y) : path.moveTo(x, y)));
      path.closePath();
    }
  }
  layer.paths = [...paths];
  draw();
}

const maps = document.createElement("canvas");
maps.id = "maps";
const probe = new OffscreenCanvas(1, 1).getContext("2d"); // tells what lies inside an outline
viewer.drawer.canvas.after(maps);

function draw() {
  const { clientWidth, clientHeight } = viewer.canvas;
  if (!viewer.world.getItemCount() || !clientWidth || !clientHeight) return;
  const ratio = window.devicePixelRatio || 1;
  maps.width = Math.round(clientWidth * ratio); // clears it
  maps.height = Math.round(clientHeight * ratio);
  const context = maps.getContext("2d");
  context.scale(ratio, ratio);
  context.imageSmoothingEnabled = false;
  for (const layer of layers.filter(({ shown }) => shown)) {
    context.globalAlpha = layer.opacity;
    if (layer.pixels) {
      const [left, top, width, height] = layer.extent;
      const [from, to] = [toScreen(left, top), toScreen(left + width, top + height)];
      context.drawImage(layer.picture, from.x, from.y, to.x - from.x, to.y - from.y);
    } else if (layer.paths) {
      context.drawImage(drawOutlines(layer.paths, ratio), 0, 0, clientWidth, clientHeight);
    }
  }
  drawScale();
}

/** Outlines on a canvas of their own, opaque, so that lines that cross fade as one picture. */
function drawOutlines(paths, ratio) {
  const canvas = new OffscreenCanvas(maps.width, maps.height);
  const context = canvas.getContext("2d");
  const corner = toScreen(slide.left, slide.top);
  const far = toScreen(slide.left + slide.width * slide.downsample, slide.top);
  const scale = (far.x - corner.x) / (slide.width * slide.downsample); // of the screen, per pixel of the slide
  context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * corner.x, ratio * corner.y);
  context.lineJoin = "bevel"; // half again as fast as round, and as good at this width
  for (const [name, path] of [...paths].reverse()) {
    for (const [colour, width] of [["white", LINE_PX + 2 * CASING_PX], [colours[name], LINE_PX]]) {
      context.strokeStyle = colour;
      context.lineWidth = width / scale;
      context.stroke(path);
    }
  }
  return canvas;
}

/** The colour of a layer at a place as `#rrggbb`; null outside of it, of its outlines, and where it is transparent. */
function colourAt(layer, x, y) {
  if (!layer.pixels) {
    const held = layer.paths?.find(([, path]) => probe.isPointInPath(path, x - slide.left, y - slide.top));
    return held ? colours[held[0]].toLowerCase() : null;
  }
  const [left, top, width, height] = layer.extent;
  const { pixels } = layer;
  if (x < left || y < top || x >= left + width || y >= top + height) return null;
  const column = Math.floor(((x - left) / width) * pixels.width);
  const row = Math.floor(((y - top) / height) * pixels.height);
  const [red, green, blue, alpha] = pixels.data.slice(4 * (row * pixels.width + column));
  return alpha ? `#${[red, green, blue].map((value) => value.toString(16).padStart(2, "0")).join("")}` : null;
}

// ---- scale bar and cursor ----------------------------------------------------------------------------------------------------
function drawScale() {
  const pixel = toScreen(slide.left + slide.downsample, slide.top).x - toScreen(slide.left, slide.top).x;
  const micronsPerPixel = (slide.mpp * slide.downsample) / pixel; // of the screen
  const unit = 10 ** Math.floor(Math.log10(BAR_PX * micronsPerPixel));
  const length = unit * [5, 2, 1].find((step) => step * unit <= BAR_PX * micronsPerPixel);
  const bar = document.querySelector("#scale span");
  bar.textContent = length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(1))} µm`;
  bar.style.width = `${length / micronsPerPixel}px`;
}

function tellCursor(event) {
  if (!viewer.world.getItemCount()) return;
  const corner = viewer.canvas.getBoundingClientRect();
  const [x, y] = toSlide(new OpenSeadragon.Point(event.clientX - corner.left, event.clientY - corner.top));
  const lines = [`x ${Math.floor(x)}, y ${Math.floor(y)} px`];
  lines.push(`${((x * slide.mpp) / 1000).toFixed(3)}, ${((y * slide.mpp) / 1000).toFixed(3)} mm`);
  const names = Object.fromEntries(classes.map(([name, colour]) => [colour.toLowerCase(), name]));
  const found = layers.filter(({ shown }) => shown).map((layer) => {
    const colour = colourAt(layer, x, y);
    const whose = layer.magnification ? `${layer.name} ${layer.magnification}x` : layer.name;
    return [`${whose}: ${names[colour] ?? "–"}`, colour];
  });
  const cursor = document.getElementById("cursor");
  cursor.replaceChildren(...[...lines.map((text) => [text, null]), ...found].map(([text, colour]) => {
    const line = document.createElement("div");
    if (colour) line.append(Object.assign(document.createElement("i"), { style: `background:${colour}` }));
    line.append(text);
    return line;
  }));
}

// ---- controls ----------------------------------------------------------------------------------------------------------------
for (const box of document.querySelectorAll("input[type=checkbox]")) {
  const layer = layers[box.dataset.layer];
  box.onchange = () => {
    layer.shown = box.checked;
    draw();
  };
}
for (const slider of document.querySelectorAll("input[type=range]")) {
  const layer = layers[slider.dataset.layer];
  slider.oninput = () => {
    layer.opacity = slider.value / 100;
    draw();
  };
  slider.oninput();
}
document.getElementById("in").onclick = () => viewer.viewport.zoomBy(2);
document.getElementById("out").onclick = () => viewer.viewport.zoomBy(0.5);
document.getElementById("home").onclick = () => viewer.viewport.goHome();
viewer.addHandler("canvas-key", (event) => {
  event.preventDefaultAction = ["KeyR", "KeyF"].includes(event.originalEvent.code); // to turn and flip: layers would stay behind
});
viewer.addHandler("update-viewport", draw);
viewer.addHandler("open", draw);
viewer.canvas.addEventListener("pointermove", tellCursor);

const first = document.querySelector("input[type=checkbox]");
if (first) first.click();
