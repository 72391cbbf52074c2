"""Downloads a dataset of the paper into a raw folder: `python -m data_prep.datasets --name=NAME --out=DIR`.

  --name                   train rows  test rows     labels
  lf_amazontitles_131k        294,805    134,835    131,073
  lf_amazon_131k              294,805    134,835    131,073  the same products, with descriptions
  mm_amazontitles_300k        586,781    260,536    303,296
  lf_amazontitles_1p3m      2,248,619    970,237  1,305,265

--parts: `text` is the repository's archive, with labels and filter files; `image_urls` the addresses of the
pictures, which `python -m data_prep.images` then downloads; `embeddings` the SigLIP 2 embeddings of the
ViXML release, which spare that. Every address has a default, which --dry_run prints. Archives lie in
--downloads; after a break or a kill they go on, and a file that you put there yourself is taken as it is.
Checksums come from the hub and from --checksums (lines of `sha256sum`); SHA256SUMS there has all of them.

Examples:
  python -m data_prep.datasets --name=lf_amazontitles_131k --out=raw/LF-AmazonTitles-131K
  python -m data_prep.datasets --name=lf_amazontitles_1p3m --out=raw/1p3m --parts=text,embeddings
  vixml prepare --raw=raw/LF-AmazonTitles-131K --out=data/lf_amazontitles_131k --name=lf_amazontitles_131k
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import flags

from data_prep import about, downloads, hub, repository, sources
from data_prep.addresses import Address, is_public
from data_prep.sources import Source
from data_prep.transfers import Client, Limits
from vixml_jax import cli, files
from vixml_jax.data import text_lines
from vixml_jax.data.formats import ABOUT, SHORT
from vixml_jax.errors import UserError

PARTS = ("text", "image_urls", "embeddings")
SUMS = "SHA256SUMS"
# The hub's list of files; everything larger is a download.
MAX_LISTING_BYTES = 64_000_000


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_enum("name", None, list(sources.SOURCES), "The dataset", required=True)
    flags.DEFINE_string("out", None, "Becomes a raw folder for `vixml prepare`", required=True)
    flags.DEFINE_list("parts", ["text", "image_urls"], f"Of {', '.join(PARTS)}")
    flags.DEFINE_string("downloads", "downloads", "Where archives lie; they can be deleted afterwards")
    flags.DEFINE_string("text_url", None, "Archive of the texts; by default the repository's")
    flags.DEFINE_string("filters_url", None, "Archive of the filter files, where the one of texts has none")
    flags.DEFINE_string("hub_url", sources.HUB_URL, "Address of the hub that has the ViXML release")
    flags.DEFINE_string("hub_repo", sources.HUB_REPO, "Its dataset repository there")
    flags.DEFINE_string("hub_revision", "main", "Branch, tag or commit of it")
    flags.DEFINE_string("checksums", None, "File of known checksums, as `sha256sum` writes it")
    flags.DEFINE_float("max_unpacked_gb", 50, "Most that an archive may unpack to", lower_bound=0)
    flags.DEFINE_float("idle_seconds", 60, "Longest silence of a server", lower_bound=0.001)
    flags.DEFINE_integer("retries", 5, "Attempts in a row that bring nothing", lower_bound=0)
    flags.DEFINE_float("backoff_seconds", 1, "Before the second of them; doubles", lower_bound=0)
    flags.DEFINE_bool("allow_private", False, "Download also from private and loopback addresses")
    flags.DEFINE_bool("dry_run", False, "Print the addresses and download nothing")


def main() -> int:
    """Runs the command."""
    values = flags.FLAGS
    source = sources.SOURCES[values.name]
    source = dataclasses.replace(
        source,
        text_url=values.text_url or source.text_url,
        filters_url=source.filters_url if values.filters_url is None else values.filters_url,
    )
    job = Job(
        source,
        Path(values.out),
        Path(values.downloads),
        hub_at=(values.hub_url, values.hub_repo, values.hub_revision),
        known=read_checksums(Path(values.checksums)) if values.checksums else {},
        limits=Limits(
            float("inf"), values.idle_seconds, retries=values.retries, backoff_seconds=values.backoff_seconds
        ),
        max_unpacked=values.max_unpacked_gb * 1e9,
        allowed=(lambda _: True) if values.allow_private else is_public,
    )
    unknown = [part for part in values.parts if part not in PARTS]
    if unknown or not values.parts:
        raise UserError(f"--parts={','.join(values.parts)}", fix=f"give some of {', '.join(PARTS)}")
    if values.dry_run:
        print("\n".join(job.plan(values.parts)))
        return 0
    for line in job.run(values.parts):
        print(line)
    prepared = f"data/{values.name}"
    print(f"next: vixml prepare --raw={values.out} --out={prepared} --name={values.name}")
    return 0


@dataclasses.dataclass
class Job:
    """The download of one dataset.

    Attributes:
      source: what is downloaded.
      out: the raw folder.
      store: where archives lie.
      hub_at: address of the hub, repository, revision.
      known: checksums by file name.
      limits: of transfers; of any size.
      max_unpacked: most bytes that an archive may unpack to.
      allowed: which addresses may be fetched from.
    """

    source: Source
    out: Path
    store: Path
    hub_at: tuple[str, str, str]
    known: dict[str, str]
    limits: Limits
    max_unpacked: float
    allowed: Callable[[Address], bool] = is_public

    def plan(self, parts: Iterable[str]) -> list[str]:
        """Says what would be fetched, and from where."""
        address, repo, revision = self.hub_at
        lines = []
        if "text" in parts:
            lines.append(f"{self._archive('text')}  {self.source.text_url}")
            if self.source.filters_url:
                lines.append(f"{self._archive('filters')}  {self.source.filters_url} (if the first has none)")
        for name in self._hub_names(parts):
            folders = " or ".join(self.source.hub_folders)
            lines.append(f"{self.out / name}  {address}/datasets/{repo} at {revision}, below {folders}")
        return lines

    def run(self, parts: Iterable[str]) -> list[str]:
        """Fetches and unpacks what is not there yet; returns what there is to tell.

        Raises:
          UserError: if something cannot be had, is broken, or finds no room.
        """
        told = []
        for directory in (self.out, self.store):
            directory.mkdir(parents=True, exist_ok=True)
        with Client(self.limits, self.allowed) as client:
            if "text" in parts:
                told += self._text(client)
            names = self._hub_names(parts)
            if names:
                self._from_hub(client, names)
        if "image_urls" in parts:
            found = [name for name in (sources.URL_LIST, repository.URL_LIST) if (self.out / name).exists()]
            if not found:
                raise UserError("holds no addresses of pictures", file=self.out, fix="give --parts=text")
            told.append(f"then: python -m data_prep.images --urls={self.out / found[0]} --raw={self.out}")
        return told

    def _text(self, client: Client) -> list[str]:
        if (self.out / ABOUT).exists():
            return [f"{self.out} has its texts already"]
        archive = self._archive("text")
        self._fetch(self.source.text_url, archive, client)
        told = []
        # Beside its place, so that files are moved, not copied; pictures may be there from another run.
        with files.scratch_dir(self.out / "unpacking") as work:
            repository.unpack(archive, work, self.max_unpacked)
            if not all((work / name).exists() for name in repository.FILTERS) and self.source.filters_url:
                filters = self._archive("filters")
                self._fetch(self.source.filters_url, filters, client)
                repository.unpack_filters(filters, work, self.max_unpacked)
            missing = [name for name in repository.FILTERS if not (work / name).exists()]
            if missing:
                told.append(f"no {' and no '.join(missing)}: nothing is left out in evaluation")
            told = [*self._count(work), *told]
            for path in sorted(work.iterdir()):
                os.replace(path, self.out / path.name)
        # The last to come: with it the texts are whole.
        about.write(
            self.out,
            description=self.source.description,
            citation=self.source.citation,
            homepage=sources.REPOSITORY,
        )
        return told

    def _count(self, directory: Path) -> list[str]:
        """Counts rows, and compares them with the published numbers."""
        lines = []
        for split, expected in self.source.rows.items():
            (path,) = directory.glob(f"{SHORT[split]}.json*")
            found = text_lines.scan(path).num_filled
            lines.append(
                f"{split:<8}{found:>10,}{'' if found == expected else f'  (published: {expected:,})'}"
            )
        return lines

    def _hub_names(self, parts: Iterable[str]) -> list[str]:
        names = []
        # The other datasets' addresses come in the archive of their texts.
        if "image_urls" in parts and self.source.folder.startswith("LF-"):
            names.append(sources.URL_LIST)
        if "embeddings" in parts:
            names += [*sources.EMBEDDINGS, *sources.MAPS]
        return names

    def _from_hub(self, client: Client, names: list[str]) -> None:
        listed: list[hub.HubFile] = []
        for name in names:
            if (self.out / name).exists():
                continue
            if not listed:
                limits = dataclasses.replace(self.limits, max_bytes=MAX_LISTING_BYTES)
                with Client(limits, self.allowed) as small:
                    listed = hub.listing(small, *self.hub_at)
            file = hub.pick(listed, self.source.hub_folders, name, self.hub_at[1])
            self._fetch(file.url, self.out / name, client, file.sha256, file.size)

    def _fetch(self, url: str, path: Path, client: Client, sha256: str = "", size: int | None = None) -> None:
        known = self.known.get(path.name, sha256)
        found = downloads.download(url, path, client, sha256=known, size=size)
        sums = read_checksums(self.store / SUMS) if (self.store / SUMS).exists() else {}
        lines = [f"{digest}  {name}\n" for name, digest in sorted({**sums, path.name: found}.items())]
        with files.atomic_file(self.store / SUMS, "w") as file:
            file.writelines(lines)

    def _archive(self, what: str) -> Path:
        return self.store / f"{self.source.folder}.{what}.zip"


def read_checksums(path: Path) -> dict[str, str]:
    """Reads the output of `sha256sum`: file name -> SHA-256 in hex.

    Raises:
      UserError: naming the line that is none.
    """
    sums = {}
    for number, line in enumerate(text_lines.lines(path), 1):
        text = line.decode("utf-8", "replace")
        if not text.strip():
            continue
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", text)
        if not found:
            fix = "a line is: 64 hex digits, two blanks, the file's name"
            raise UserError("not a checksum", file=path, row=number, fix=fix)
        sums[Path(found[2]).name] = found[1].lower()
    return sums


if __name__ == "__main__":
    sys.exit(cli.run_job(sys.modules[__name__], "python -m data_prep.datasets"))
