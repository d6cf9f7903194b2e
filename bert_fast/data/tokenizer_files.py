"""The tokenizer of a store as the files that transformers reads next to a model, so that text gets the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bert_fast.data.wordpiece import SPECIAL_TOKENS, WordPiece, as_text, load_vocabulary
from bert_fast.run_folder import TOKENIZER_FILES

_ROLES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))


def tokenizer_files(vocab_path: str | Path, max_length: int, normalization: dict[str, Any]) -> dict[str, str]:
    """Contents by file name: vocab.txt, tokenizer.json, and the configuration that names the special tokens.

    Args:
        vocab_path: a BERT `vocab.txt`.
        max_length: tokens of the longest sequence that the model takes.
        normalization: `lowercase` and `strip_accents` of a store's manifest; where one is missing, that of `WordPiece`.

    Raises:
        UserError: as `load_vocabulary`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, processors

    vocabulary = load_vocabulary(vocab_path)
    described = json.loads(WordPiece(vocab_path)._tokenizer.to_str())
    for name in ("lowercase", "strip_accents"):
        if normalization.get(name) is not None:
            described["normalizer"][name] = normalization[name]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary.cls_id), ("[SEP]", vocabulary.sep_id)],
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which uses tokenizer.json; BertTokenizer makes one with other limits
        "do_lower_case": described["normalizer"]["lowercase"],
        "strip_accents": described["normalizer"]["strip_accents"],
        "tokenize_chinese_chars": described["normalizer"]["handle_chinese_chars"],
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **_ROLES,
    }
    contents = (
        as_text(vocabulary.tokens),
        tokenizer.to_str(pretty=True) + "\n",
        json.dumps(settings, indent=2) + "\n",
        json.dumps(_ROLES, indent=2) + "\n",
    )
    return dict(zip(TOKENIZER_FILES, contents, strict=True))
