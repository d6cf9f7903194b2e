"""A folder that Hugging Face `datasets` saved with `save_to_disk`, one pair per row; read without `datasets`."""

from __future__ import annotations

import json
from pathlib import Path

from bert_fast.data.pairs.sources.base import SourceOptions
from bert_fast.data.pairs.sources.parquet import Parquet
from bert_fast.data.streams import Source
from bert_fast.errors import UserError


class SavedDataset(Parquet):
    def files(self, options: SourceOptions) -> list[Source]:
        """The Arrow files that the folder's `state.json` names, in its order."""
        assert options.path is not None
        folder = Path(options.path)
        if not folder.is_dir():
            raise UserError(f"source {options.name}: folder {folder} does not exist; name one after {options.kind}:")
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if not (folder / "state.json").is_file():
            if splits:
                raise UserError(
                    f"source {options.name}: {folder} holds {', '.join(splits)[:200]}; name one, {folder / splits[0]}"
                )
            raise UserError(
                f"source {options.name}: {folder} has no state.json; name a folder that save_to_disk of `datasets` wrote"
            )
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            names = [str(entry["filename"]) for entry in state["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder}: state.json names no files; save or copy the dataset again") from None
        missing = next((name for name in names if not (folder / name).is_file()), None)
        if missing or not names:
            raise UserError(
                f"{folder}: state.json names {missing or 'no file'}, which is not there; save or copy the dataset again"
            )
        return [Source(name, str(folder / name)) for name in names]


READER = SavedDataset()
