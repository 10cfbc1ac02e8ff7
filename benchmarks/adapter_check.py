"""What an adapter is worth outside its run: its size, merged beside unmerged, and the same adapter under `peft` on transformers.

    python benchmarks/adapter_check.py runs/finetune/anna      # a run of finetune.py with adapter=lora or dora; a line of JSON

The base is the one the run was trained from; it is exported to transformers' layout, where `peft` loads the adapter's folder.
Differences are the largest of any logit, over held-out recordings of the run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from csm import CSM
from csm.data.shards import iter_samples
from csm.frames import Batch, rows_from_turns
from csm.generation.checkpoint import find_adapter
from csm.model.adapter_files import WEIGHTS_NAME, load_adapter
from csm.model.lora import merged_adapter
from csm.model.pretrained import load_model, resolve_checkpoint
from csm.text import tokenizer_from_folder

NUM_SAMPLES = 8


@torch.no_grad()
def logits(model: CSM, batch: Batch) -> Tensor:
    """Every logit of the learnt rows, c0's and the depth decoder's, flat."""
    out = model(batch.tokens, batch.mask, batch.document_ids, batch.learn_depth.nonzero())
    return torch.cat((out.c0_logits[batch.mask.any(-1)].flatten(), out.depth_logits.flatten()))


@torch.no_grad()
def peft_c0_logits(base: CSM, adapter: Path, batch: Batch, folder: Path) -> Tensor:
    """Codebook 0's logits under transformers and peft."""
    from peft import PeftModel
    from transformers import CsmForConditionalGeneration

    base.save_pretrained(folder, layout="transformers")
    plain = CsmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, adapter).eval()
    inner = theirs.base_model.model
    audio, text = inner.backbone_model.embed_tokens(batch.tokens[..., :-1]), inner.embed_text_tokens(batch.tokens[..., -1])
    embeds = torch.where(batch.mask[..., :1], audio, text)
    mask = batch.mask.any(-1)
    return theirs(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).logits[mask].flatten()


def check(run: Path) -> dict[str, Any]:
    """The numbers of one run."""
    torch.set_num_threads(1)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    best, adapter = resolve_checkpoint(run), find_adapter(run)
    base = load_model(resolve_checkpoint(settings["base"]))
    data = settings["data"]["val_path"] or settings["data"]["path"]
    tokenizer = tokenizer_from_folder(best)
    samples = [sample for _, sample in zip(range(NUM_SAMPLES), iter_samples(Path(data) / settings["data"]["val_split"]), strict=False)]
    batch = Batch.from_documents([[rows_from_turns(sample.turns, tokenizer, base.config.num_codebooks)] for sample in samples])
    with tempfile.TemporaryDirectory() as folder:
        theirs = peft_c0_logits(base, adapter, batch, Path(folder))
    size = sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS_NAME).values())
    num_parameters = base.num_parameters
    load_adapter(base, adapter)
    base.eval()
    apart = logits(base, batch)
    with merged_adapter(base):
        merged = logits(base, batch)
    saved = logits(load_model(best).eval(), batch)
    return {
        "run": str(run),
        "adapter_parameters": size,
        "share": round(size / num_parameters, 5),
        "merged_vs_unmerged": float((merged - apart).abs().max()),
        "checkpoint_vs_unmerged": float((saved - apart).abs().max()),
        "peft_vs_unmerged_c0": float((theirs - apart[: len(theirs)]).abs().max()),
        "largest_logit": float(apart.abs().max()),
        "num_logits": len(apart),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    print(json.dumps(check(parser.parse_args().run)))
