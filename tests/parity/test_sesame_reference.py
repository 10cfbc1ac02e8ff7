"""Our model against a second one, written from DESIGN.md section 1 with explicit loops and run on a file in Sesame's layout.

Nothing of csm's model is used by the reference: it reads the safetensors file by Sesame's names, one position, one head and
one lane pair at a time, in float64. So an error that our code and its reverse share (the permutation, the off-by-one of
h_{t-1}, the table's offsets) shows here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from csm import CSM
from csm.frames import Batch

LOGITS_TOLERANCE = 2e-4  # ours is float32, the reference float64; logits up to about 10


class Reference:
    """CSM from DESIGN.md: slow, plain, one position at a time."""

    def __init__(self, folder: Path) -> None:
        self.weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.shapes = json.loads((folder / "config.json").read_text())["csm"]

    def rms_norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return x / math.sqrt(float((x * x).mean()) + eps) * self.weights[name]

    def frequency(self, pair: int, shape: dict) -> float:
        head_dim = shape["width"] // shape["num_heads"]
        frequency = shape["rope_base"] ** (-2 * pair / head_dim)
        factor = shape["rope_scaling_factor"]
        if factor is None:
            return frequency
        wavelength = 2 * math.pi / frequency
        longest, shortest = (shape["rope_original_context"] / shape[key] for key in ("rope_low_freq_factor", "rope_high_freq_factor"))
        if wavelength < shortest:
            return frequency
        if wavelength > longest:
            return frequency / factor
        low, high = shape["rope_low_freq_factor"], shape["rope_high_freq_factor"]
        smooth = (shape["rope_original_context"] / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency

    def rotate(self, head: torch.Tensor, position: int, shape: dict) -> torch.Tensor:
        """Lanes 2i and 2i+1 turn together by position * frequency i."""
        turned = head.clone()
        for pair in range(head.shape[0] // 2):
            angle = position * self.frequency(pair, shape)
            a, b = float(head[2 * pair]), float(head[2 * pair + 1])
            turned[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def transformer(self, inputs: list[torch.Tensor], prefix: str, shape: dict) -> list[torch.Tensor]:
        head_dim = shape["width"] // shape["num_heads"]
        group = shape["num_heads"] // shape["num_kv_heads"]
        states = list(inputs)
        for layer in range(shape["num_layers"]):
            names = f"{prefix}.layers.{layer}"
            normed = [self.rms_norm(x, f"{names}.sa_norm.scale", shape["norm_eps"]) for x in states]
            heads = {}
            for kind, count in (("q", shape["num_heads"]), ("k", shape["num_kv_heads"]), ("v", shape["num_kv_heads"])):
                weight = self.weights[f"{names}.attn.{kind}_proj.weight"]
                heads[kind] = [list((weight @ x).view(count, head_dim)) for x in normed]
            for position in range(len(states)):
                for kind in ("q", "k"):
                    heads[kind][position] = [self.rotate(head, position, shape) for head in heads[kind][position]]
            for position in range(len(states)):
                mixed = []
                for head in range(shape["num_heads"]):
                    query = heads["q"][position][head]
                    scores = [float(query @ heads["k"][past][head // group]) / math.sqrt(head_dim) for past in range(position + 1)]
                    largest = max(scores)
                    weights = [math.exp(score - largest) for score in scores]
                    values = [heads["v"][past][head // group] for past in range(position + 1)]
                    mixed.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
                states[position] = states[position] + self.weights[f"{names}.attn.output_proj.weight"] @ torch.cat(mixed)
            for position, x in enumerate(states):
                normed_x = self.rms_norm(x, f"{names}.mlp_norm.scale", shape["norm_eps"])
                gate = self.weights[f"{names}.mlp.w1.weight"] @ normed_x
                up = self.weights[f"{names}.mlp.w3.weight"] @ normed_x
                states[position] = x + self.weights[f"{names}.mlp.w2.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        return [self.rms_norm(x, f"{prefix}.norm.scale", shape["norm_eps"]) for x in states]

    def audio_embedding(self, code: int, codebook: int) -> torch.Tensor:
        return self.weights["audio_embeddings.weight"][code + self.shapes["audio_vocab_size"] * codebook]

    def backbone(self, tokens: list[list[int]], mask: list[list[bool]]) -> list[torch.Tensor]:
        inputs = []
        for row, counts in zip(tokens, mask, strict=True):
            total = torch.zeros(self.shapes["backbone"]["width"], dtype=torch.float64)
            for codebook, (code, is_there) in enumerate(zip(row[:-1], counts[:-1], strict=True)):
                if is_there:
                    total = total + self.audio_embedding(code, codebook)
            if counts[-1]:
                total = total + self.weights["text_embeddings.weight"][row[-1]]
            inputs.append(total)
        return self.transformer(inputs, "backbone", self.shapes["backbone"])

    def depth_logits(self, hidden_before: torch.Tensor, codes: list[int]) -> torch.Tensor:
        """[K-1, V]: the input is h_{t-1} and codebooks 0..K-2; output i goes through head i-1."""
        inputs = [hidden_before] + [self.audio_embedding(code, codebook) for codebook, code in enumerate(codes[:-1])]
        outputs = self.transformer([self.weights["projection.weight"] @ x for x in inputs], "decoder", self.shapes["depth_decoder"])
        return torch.stack([outputs[i] @ self.weights["audio_head"][i - 1] for i in range(1, len(codes))])


@pytest.fixture
def reference(loud_model: CSM, tmp_path: Path) -> Reference:
    loud_model.save_pretrained(tmp_path / "sesame", layout="sesame")
    return Reference(tmp_path / "sesame")


@torch.no_grad()
def test_logits_equal_the_reference(loud_model: CSM, reference: Reference, batch: Batch):
    row = 1
    length = int((batch.document_ids[row] >= 0).sum())
    tokens, mask = batch.tokens[row, :length].tolist(), batch.mask[row, :length].tolist()
    hidden = reference.backbone(tokens, mask)
    frames = [length - 1, length - 4]  # the EOS row and a frame
    out = loud_model(batch.tokens, batch.mask, document_ids=batch.document_ids, depth_index=torch.tensor([[row, t] for t in frames]))
    c0_logits = torch.stack([reference.weights["codebook0_head.weight"] @ h for h in hidden])
    torch.testing.assert_close(out.hidden[row, :length].double(), torch.stack(hidden), atol=LOGITS_TOLERANCE, rtol=0)
    torch.testing.assert_close(out.c0_logits[row, :length].double(), c0_logits, atol=LOGITS_TOLERANCE, rtol=0)
    for index, frame in enumerate(frames):
        expected = reference.depth_logits(hidden[frame - 1], tokens[frame][:-1])
        torch.testing.assert_close(out.depth_logits[index].double(), expected, atol=LOGITS_TOLERANCE, rtol=0)


def test_permuted_heads_give_the_same_attention_with_halves():
    """The transformers border: rows permuted, lanes turned in halves, every query-key product as before."""
    from csm.model.layouts import halves_from_interleaved, interleaved_from_halves

    generator = torch.Generator().manual_seed(1)
    num_heads, head_dim, width = 3, 8, 10
    weight = torch.randn(num_heads * head_dim, width, generator=generator, dtype=torch.float64)
    permuted = halves_from_interleaved(weight, num_heads)
    assert torch.equal(interleaved_from_halves(permuted, num_heads), weight)
    x, y = torch.randn(2, width, generator=generator, dtype=torch.float64)

    def turned(w: torch.Tensor, x: torch.Tensor, position: int, pairs: list[tuple[int, int]]) -> torch.Tensor:
        heads = (w @ x).view(num_heads, head_dim).clone()
        for index, (a, b) in enumerate(pairs):
            angle = position * 10.0 ** (-index)
            first, second = heads[:, a].clone(), heads[:, b].clone()
            heads[:, a] = first * math.cos(angle) - second * math.sin(angle)
            heads[:, b] = first * math.sin(angle) + second * math.cos(angle)
        return heads

    interleaved = [(2 * i, 2 * i + 1) for i in range(head_dim // 2)]
    halves = [(i, i + head_dim // 2) for i in range(head_dim // 2)]
    expected = (turned(weight, x, 5, interleaved) * turned(weight, y, 2, interleaved)).sum(dim=1)
    torch.testing.assert_close((turned(permuted, x, 5, halves) * turned(permuted, y, 2, halves)).sum(dim=1), expected)
