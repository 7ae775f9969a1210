"""Is this machine ready: small checks of the environment, the configuration and the cohort, each with what would mend it."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from mad.config import Config, load_config
from mad.files import Pathlike, is_there
from mad.reporting.check import REINSTALL, Check, Status, guarded
from mad.reporting.check_slides import check_codecs, check_h5py, check_openslide, check_readers
from mad.slides.sheet import cohort_rows

CONSTRAINTS = Path("envs/constraints.txt")


def examine(config_path: Pathlike) -> list[Check]:
    """All checks, in order. Those of results folder, cohort and token need a configuration that parses."""
    checks = [
        guarded("python", REINSTALL, check_python),
        guarded("packages", REINSTALL, lambda: check_packages(CONSTRAINTS)),
        guarded("openslide", REINSTALL, check_openslide),
        guarded("readers", REINSTALL, check_readers),
        guarded("codecs", REINSTALL, check_codecs),
        guarded("h5py", REINSTALL, check_h5py),
        guarded("torch", REINSTALL, check_torch),
        guarded("torchvision", REINSTALL, check_torchvision),
        guarded("timm", REINSTALL, check_timm),
        guarded("gpu", "see that the driver fits torch's CUDA (nvidia-smi)", check_gpu),
        guarded("xformers", "install the xformers built for this torch, or uninstall it", check_xformers),
        guarded("snakemake", REINSTALL, check_snakemake),
    ]
    config: Config | None = None
    try:
        config = load_config(config_path)
    except Exception as error:  # a fault of the keys, or no YAML at all
        mend = "name the file with --config, and mend the keys named above (`mad config schema` explains each)"
        checks.append(Check("config", "FAIL", str(error), f"{mend}; disk, cohort and token are checked then"))
    if config is not None:
        settings = config
        checks += [
            Check("config", "PASS", f"{config_path}: {len(config.runs)} run(s), {len(config.encoders)} encoder(s)"),
            guarded("disk", "set `results` to a folder that exists", lambda: check_disk(settings.results)),
            guarded("cohort", "mend the sheet that cohort.sheet names", lambda: check_cohort(settings)),
            guarded("token", "set HF_TOKEN", lambda: check_token(settings)),
        ]
    return checks


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Python 3.11 or later."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "FAIL", found, "make an environment with Python 3.11")
    return Check("python", "PASS", found)


def check_packages(constraints: Path) -> Check:
    """What the package requires is there, in versions that it takes, and those versions are the ones that were tried."""
    required = [Requirement(text) for text in metadata.requires("mad") or []]
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = []
    for requirement in required:
        found = _version(requirement.name)
        if found is None:
            faults.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if faults:
        return Check("packages", "FAIL", "; ".join(faults), REINSTALL)
    if not constraints.exists():
        return Check("packages", "PASS", f"all {len(required)} there; no {constraints} here to compare versions with")
    pins = [line.split("==") for line in constraints.read_text(encoding="utf-8").splitlines() if "==" in line]
    pairs = [(name.strip(), pin.split(";")[0].strip(), _version(name.strip())) for name, pin in pins if name[0] != "#"]
    other = [
        f"{name} {found} (tried with {pin})"
        for name, pin, found in pairs
        if found is not None and Version(found).public != Version(pin).public  # 2.10.0+cpu is 2.10.0
    ]
    if other:
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        return Check(
            "packages", "WARN", f"{len(other)} differ from {constraints}: {', '.join(other[:8])}{more}", REINSTALL
        )
    return Check("packages", "PASS", f"all {len(required)} there, versions as in {constraints}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_torch() -> Check:
    """torch imports and multiplies."""
    import torch

    if float((torch.ones(4, 4) @ torch.ones(4, 4)).sum()) != 64:
        return Check("torch", "FAIL", f"{torch.__version__} multiplies wrongly", REINSTALL)
    return Check("torch", "PASS", f"{torch.__version__}, {torch.get_num_threads()} thread(s)")


def check_torchvision() -> Check:
    """torchvision is built for this torch: its compiled operators are there."""
    import torch
    import torchvision

    found = f"{torchvision.__version__} beside torch {torch.__version__}"
    for text in metadata.requires("torchvision") or []:
        requirement = Requirement(text)
        public = Version(torch.__version__).public
        if requirement.name == "torch" and not requirement.specifier.contains(public, prereleases=True):
            return Check("torchvision", "FAIL", f"{found}: it asks for torch{requirement.specifier}", REINSTALL)
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 9, 9]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        return Check("torchvision", "FAIL", f"{found}: its operator nms gives {kept}, not [0, 2]", REINSTALL)
    return Check("torchvision", "PASS", f"{found}, operators work")


def check_timm() -> Check:
    """timm imports."""
    import timm

    return Check("timm", "PASS", str(timm.__version__))


def check_gpu() -> Check:
    """A CUDA GPU, its memory, and whether it computes in bfloat16."""
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            mend = "update the driver, or install a torch built for the driver's CUDA (nvidia-smi tells it)"
            return Check("gpu", "WARN", f"an NVIDIA driver is here, torch {torch.__version__} sees no GPU", mend)
        finding = "none; the demo takes minutes on a CPU"
        return Check("gpu", "WARN", finding, "for trainings of the paper's size use a machine with a CUDA GPU")
    names = []
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        names.append(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)")
    return Check("gpu", "PASS", f"{', '.join(names)}, {'bf16' if torch.cuda.is_bf16_supported() else 'no bf16'}")


def check_xformers() -> Check:
    """Where there is a GPU: xformers' attention runs on it."""
    import torch

    if not torch.cuda.is_available():
        return Check("xformers", "PASS", "not tried: it is of use on a CUDA GPU alone")
    if _version("xformers") is None:
        return Check("xformers", "WARN", "not installed: torch's own attention serves", "pip install xformers")
    from xformers.ops import memory_efficient_attention

    tokens = torch.ones(1, 8, 2, 32, device="cuda", dtype=torch.float16)
    if not torch.allclose(memory_efficient_attention(tokens, tokens, tokens), tokens):
        return Check("xformers", "FAIL", "its attention computes wrongly on this GPU", "pip uninstall xformers")
    return Check("xformers", "PASS", f"{_version('xformers')}, its attention runs on this GPU")


def check_snakemake() -> Check:
    """Snakemake is installed and can be called."""
    found = _version("snakemake")
    if found is None:
        return Check("snakemake", "FAIL", "not installed", REINSTALL)
    if shutil.which("snakemake") is None:
        mend = f"activate the environment of {sys.executable}"
        return Check("snakemake", "WARN", f"{found} is installed, the command is not on the path", mend)
    return Check("snakemake", "PASS", found)


def check_disk(results: Pathlike, *, warn_gb: float = 20, fail_gb: float = 2) -> Check:
    """The results folder can be written to and has room."""
    folder = Path(results).absolute()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return Check("disk", "FAIL", f"{folder} cannot be written to", "set `results` to a folder of your own")
    free = shutil.disk_usage(folder).free / 1e9
    status: Status = "FAIL" if free < fail_gb else "WARN" if free < warn_gb else "PASS"
    mend = "" if status == "PASS" else "make room, or set `results` to a folder on a larger disk"
    return Check("disk", status, f"{free:.1f} GB free at {folder}", mend)


def check_cohort(config: Config) -> Check:
    """The cohort sheet is right, and the files that it names are there."""
    rows = cohort_rows(config)
    found = Counter(slide=0, annotation=0)
    missing: list[str] = []
    for row in rows:
        for kind, path in (("slide", row.path), ("annotation", row.annotation)):
            if path and is_there(path) and Path(path).is_file():
                found[kind] += 1
            elif path:
                missing.append(path)
    annotated = sum(row.annotation is not None for row in rows)
    there = f"{found['slide']} of {len(rows)} slides and {found['annotation']} of {annotated} annotations on disk"
    if not config.cohort.sheet:
        return Check("cohort", "PASS", f"synthetic, {there} (the workflow makes the rest)")
    finding = f"{config.cohort.sheet}: {there}"
    if not missing:
        return Check("cohort", "PASS", finding)
    stops = found["slide"] == 0 or config.on_bad_slide == "fail"
    mend = f"mend the columns `path` and `annotation` (relative paths start at the sheet's folder); first: {missing[0]}"
    return Check("cohort", "FAIL" if stops else "WARN", finding, mend)


def check_token(config: Config) -> Check:
    """Where an encoder comes from the Hugging Face hub: a token is there (its worth is not tried, nor is it read)."""
    names = [e.name for e in config.encoders if e.spec.startswith(("hf-hub:", "hf_hub:"))]
    if not names:
        return Check("token", "PASS", "no encoder comes from the Hugging Face hub")
    from huggingface_hub import constants

    if os.environ.get("HF_TOKEN") or Path(constants.HF_TOKEN_PATH).exists():
        return Check("token", "PASS", f"there, for {', '.join(names)}")
    mend = "for a gated model accept its licence on its page, then set HF_TOKEN or run `hf auth login`"
    return Check("token", "WARN", f"no Hugging Face token, for {', '.join(names)}", mend)
