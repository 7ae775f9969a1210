"""Where a run starts: the file of weights that `init` names, and the licence that those weights come with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from mad.config.training import WEIGHT_FILES, RunConfig
from mad.files import MadError
from mad.models.export import OWN_LICENCE


@dataclass(frozen=True)
class Source:
    """Weights that a run starts from."""

    path: Path
    """The file."""
    licence: str | None
    """As the model card beside it names it, e.g. `cc-by-nc-4.0`; None where it is unknown."""


def find_source(run: RunConfig, results: Path) -> Source | None:
    """The weights that `run.init` names, downloaded where they are on the hub; None for `random` and `timm`.

    Raises:
        MadError: they are missing, gated or out of reach; the text says what would mend it.
    """
    kind, _, target = run.init.partition(":")
    if kind == "run":
        path = results / "train" / target / "encoder" / WEIGHT_FILES[0]
        if not path.exists():
            raise MadError(f"{path}: no such weights; train the run that `init` names first")
        return Source(path, card_licence(path.parent / "README.md"))
    if kind == "file":
        path, named = run.init_file or Path(target), Path(target)
        if not path.is_file():
            wanted = f"a folder without {' and '.join(WEIGHT_FILES)}" if named.is_dir() else "no such file"
            raise MadError(f"runs.{run.name}.init: {named}: {wanted}; name a .safetensors or .pth file or its folder")
        return Source(path, card_licence(named / "README.md"))
    if kind == "hf-hub":
        return _download(target, run.name)
    return None


def initial_licence(run: RunConfig, source: Source | None, model: nn.Module) -> str | None:
    """Licence of the weights that `run` starts from; random ones come with this package's, None where it is unknown."""
    if run.init == "random":
        return OWN_LICENCE
    if source:
        return source.licence
    cfg: Any = model.pretrained_cfg
    return cfg.get("license")


def card_licence(card: Path) -> str | None:
    """The licence in the front matter of a model card; None where there is none."""
    try:
        licence = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def _download(target: str, run: str) -> Source:
    """The weights of OWNER/NAME[@REVISION], from the cache where the hub is out of reach."""
    repository, _, revision = target.partition("@")
    key, page = f"runs.{run}.init: hf-hub:{target}", f"https://huggingface.co/{repository}"
    reached = True
    instead = "download the weights where that is possible and set init: file:PATH"
    for name in WEIGHT_FILES:
        try:
            path = Path(hf_hub_download(repository, name, revision=revision or None))
        except GatedRepoError:
            raise MadError(
                f"{key}: these weights are gated. Accept their licence at {page}, make a token at "
                f"https://huggingface.co/settings/tokens and set HF_TOKEN to it, or {instead}"
            ) from None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise MadError(
                f"{key}: the hub has no such repository or revision, or it is private; see {page}. For a private one set "
                "HF_TOKEN to a token that may read it"
            ) from None
        except LocalEntryNotFoundError:
            reached = False
            continue  # the next name may be in the cache
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise MadError(f"{key}: cannot be downloaded ({str(error)[:200]}); try again, or {instead}") from None
        return Source(path, _hub_licence(repository, revision))
    if not reached:
        raise MadError(f"{key}: the hub is out of reach and its cache (HF_HOME) does not hold them; {instead}")
    raise MadError(
        f"{key}: the repository has no {' or '.join(WEIGHT_FILES)}; see {page}/tree/main, download the file of weights and set "
        "init: file:PATH"
    )


def _hub_licence(repository: str, revision: str) -> str | None:
    try:
        return card_licence(Path(hf_hub_download(repository, "README.md", revision=revision or None)))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None
