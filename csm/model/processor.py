"""transformers' processor files beside an exported model: Llama-3's tokenizer with CSM's four specials, and the template.

With them `AutoProcessor.from_pretrained(folder)` turns a conversation into ids as DESIGN.md section 1 says: `[speaker]text`
between BOS and EOS, then one audio token a frame and the audio EOS.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from csm.frames import SAMPLE_RATE_HZ

NUM_SPECIALS = 256  # of Llama-3, from id 128000 on
_NAMED_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>")
_CHAT_TEMPLATE = """
{%- for message in messages %}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'text' %}
            {{- '<|begin_of_text|>[' + message['role'] + ']' + part['text'] + '<|end_of_text|>' }}
        {%- elif part['type'] == 'audio' %}
            {{- '<|AUDIO|><|audio_eos|>' }}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
""".strip()


def save_processor(folder: str | Path, tokenizer: str | Path, text_vocab_size: int) -> None:
    """Write tokenizer, feature extractor and chat template into `folder`.

    Args:
        tokenizer: Llama-3's `tokenizer.model` (tiktoken), or a folder with a transformers tokenizer that has CSM's specials.
        text_vocab_size: of the model; the ids must fit.
    Raises:
        FileNotFoundError: if there is no tokenizer at `tokenizer`.
        ValueError: if it has more ids than the model.
    """
    from transformers import CsmProcessor, EncodecFeatureExtractor

    source = Path(tokenizer)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no tokenizer there; give Llama-3's tokenizer.model, as `pip install llama-models` brings it")
    fast = _from_tiktoken(source) if source.is_file() else _from_folder(source)
    if len(fast) > text_vocab_size:
        raise ValueError(f"{source}: {len(fast)} ids, the model reads {text_vocab_size}; export it without tokenizer")
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=SAMPLE_RATE_HZ, padding_value=0.0)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".processor-") as part:
        CsmProcessor(feature_extractor=extractor, tokenizer=fast, chat_template=_CHAT_TEMPLATE).save_pretrained(part)
        for path in sorted(Path(part).iterdir()):
            os.replace(path, folder / path.name)


def _from_tiktoken(path: Path) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    reserved = (f"<|reserved_special_token_{index}|>" for index in range(NUM_SPECIALS - len(_NAMED_SPECIALS)))
    specials = [*_NAMED_SPECIALS, *reserved]
    core = TikTokenConverter(str(path), extra_special_tokens=specials).converted()
    bos, eos, audio, _ = _NAMED_SPECIALS
    # As CSM's does: `processor(text, add_special_tokens=True)` gives a turn's ids.
    ids = [(token, core.token_to_id(token)) for token in (bos, eos)]
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=audio, padding_side="left")


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{folder}: no transformers tokenizer there ({error})") from error
    missing = [token for token in _NAMED_SPECIALS if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"{folder}: its tokenizer lacks {', '.join(missing)}; give CSM's tokenizer, or Llama-3's tokenizer.model")
    return tokenizer
