"""Weights that others published: found on a disk or on the Hugging Face hub, with the licence that they come with."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mad.config.weights import WEIGHT_FILES, weights_file
from mad.files import MadError, StorageError, read_json
from mad.models.registry import PUBLISHED

LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO}  # faults of this machine, not of the hub


class MissingWeightsError(MadError):
    """Published weights that cannot be had here: gated, out of reach, or not where they were looked for."""


MeanStd = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Source:
    """A file of weights."""

    path: Path
    """The file."""
    licence: str | None
    """As the model card beside it names it, e.g. `cc-by-nc-4.0`; None where it is unknown."""
    mean_std: MeanStd | None = None
    """Channel means and deviations of intensities in [0, 1] that its images are normalised by; None where nothing tells."""


def local_weights(path: str, key: str) -> Source:
    """The weights in a file or folder.

    Args:
        path: of a .safetensors or .pth file, or of its folder.
        key: the setting that names it, for messages.

    Raises:
        MissingWeightsError: there are none.
    """
    named, found = Path(path), weights_file(path)
    try:
        with found.open("rb"):
            pass
    except PermissionError as error:
        raise MissingWeightsError(f"{key}: {named}: {error.strerror}; mend its permissions") from None
    except OSError:
        wanted = f"a folder without {' and '.join(WEIGHT_FILES)}" if named.is_dir() else "no such file"
        raise MissingWeightsError(f"{key}: {named}: {wanted}; name a .safetensors or .pth file or its folder") from None
    return Source(found, card_licence(named / "README.md"), stated_mean_std(named.joinpath))


def stated_mean_std(find: Callable[[str], Path]) -> MeanStd | None:
    """How the images of a model are normalised, as timm's `config.json` or transformers' `preprocessor_config.json` tells.

    Args:
        find: the path of a file of the model's by its name; what it raises where there is none is an OSError, or the hub's.
    """
    for name, section, keys in (
        ("config.json", "pretrained_cfg", ("mean", "std")),
        ("preprocessor_config.json", None, ("image_mean", "image_std")),
    ):
        try:
            told = read_json(find(name))
            told = told[section] if section else told
            mean, std = (tuple(map(float, told[key])) for key in keys)
        except (OSError, EntryNotFoundError, HfHubHTTPError, MadError, ValueError, KeyError, TypeError):
            continue
        return mean, std
    return None


def card_licence(card: Path) -> str | None:
    """The licence in the front matter of a model card; None where there is none."""
    try:
        licence = (metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def config_file(source: str, cache: str | None = None) -> Path | None:
    """The config.json that timm has just made a model of: it holds its arguments, of which weights keep no trace.

    Args:
        source: as `timm.create_model` takes it, `local-dir:FOLDER` or `hf-hub:OWNER/MODEL@REVISION`; of another name None.
        cache: folder of the hub's files, where it is not the usual one.
    """
    kind, _, target = source.partition(":")
    if kind == "local-dir":
        return Path(target) / "config.json"
    if kind not in ("hf-hub", "hf_hub"):
        return None
    repository, _, revision = target.partition("@")
    found = try_to_load_from_cache(repository, "config.json", cache, revision or None)
    return Path(found) if isinstance(found, str) else None


def check_local(error: Exception, key: str) -> None:
    """Stop where a download failed for the machine's own reasons, such as a full disk: the weights can be had.

    Raises:
        StorageError: it did.
    """
    if isinstance(error, OSError) and error.errno in LOCAL:
        raise StorageError(
            f"{key}: cannot be downloaded to this machine ({error}); mend the disk or the folder HF_HOME, and run again"
        ) from None


def hub_weights(target: str, key: str, instead: str) -> Source:
    """The weights of OWNER/NAME[@REVISION] on the Hugging Face hub, from the cache where the hub is out of reach.

    Args:
        target: the repository.
        key: the setting that names it, for messages.
        instead: what to do where it cannot be had, for messages.

    Raises:
        MissingWeightsError: they are gated, absent or out of reach; the text says what would mend it.
        StorageError: this machine cannot keep them.
    """
    repository, _, revision = target.partition("@")
    page = f"https://huggingface.co/{repository}"
    reached = True
    for name in WEIGHT_FILES:
        try:
            path = Path(hf_hub_download(repository, name, revision=revision or None))
        except GatedRepoError:
            raise MissingWeightsError(
                f"{key}: these weights are gated. Accept their licence at {page}, make a token at "
                f"https://huggingface.co/settings/tokens and set HF_TOKEN to it, or {instead}"
            ) from None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise MissingWeightsError(
                f"{key}: the hub has no such repository or revision, or it is private; see {page}. For a private one set "
                "HF_TOKEN to a token that may read it"
            ) from None
        except LocalEntryNotFoundError:
            reached = False
            continue  # the next name may be in the cache
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            check_local(error, key)
            raise MissingWeightsError(
                f"{key}: cannot be downloaded ({str(error)[:200]}); try again, or {instead}"
            ) from None
        return Source(path, _hub_licence(repository, revision), _hub_mean_std(repository, revision))
    if not reached:
        raise MissingWeightsError(
            f"{key}: the hub is out of reach and its cache (HF_HOME) does not hold them; {instead}"
        )
    raise MissingWeightsError(
        f"{key}: the repository has no {' or '.join(WEIGHT_FILES)}; see {page}/tree/main, and {instead}"
    )


def _hub_mean_std(repository: str, revision: str) -> MeanStd | None:
    published = next((entry.mean_std for entry in PUBLISHED.values() if entry.hub == repository), None)
    return published or stated_mean_std(lambda name: Path(hf_hub_download(repository, name, revision=revision or None)))


def _hub_licence(repository: str, revision: str) -> str | None:
    try:
        return card_licence(Path(hf_hub_download(repository, "README.md", revision=revision or None)))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None
