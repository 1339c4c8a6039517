"""Language models, and WikiText-103: an LSTM with projection, a transformer, adaptive embedding and softmax.

All of them look as micronet_eval.language says: forward(tokens, state, cluster) -> (log-probabilities, state).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from micronet_eval.task import DataMissing, Split, Task

WORDS = 267_735  # of WikiText-103's training text, <unk> and <eos> among them
TEST_TOKENS = 245_569
PIECE = 128  # tokens that go through the model at a time; the state goes on to the next

# --- the vocabulary ---------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """The vocabulary as vectors (embedding) and as log-probabilities (softmax), in clusters of falling frequency.

    One cluster is the plain embedding and softmax. With `cutoffs` they are the adaptive ones of Baevski and Auli 2018
    (arXiv 1809.10853) and Grave et al. 2016 (arXiv 1609.04309): cluster i has vectors of width / factor^i values, a
    projection each way, and for each rare cluster one more output beside the words of the first.

    A cluster's table is the weight of a linear layer: as a product it gives the scores, and looking up its rows is the
    embedding. `tied`: both are one table.
    """

    def __init__(self, words: int, width: int, cutoffs: Sequence[int], factor: int, tied: bool) -> None:
        super().__init__()
        self.cutoffs = tuple(cutoffs)
        self.starts = (0, *self.cutoffs)
        self.sizes = tuple(end - start for start, end in zip(self.starts, (*self.cutoffs, words), strict=True))
        if min(self.sizes) < 1:
            raise ValueError(f"cutoffs {list(cutoffs)}: ids that rise, above 0 and below the {words} words")
        widths = [width // factor**i for i in range(len(self.sizes))]
        if widths[-1] < 1:
            raise ValueError(f"factor {factor} leaves no values for the vectors of cluster {len(widths)}")
        self.scores = _tables(self.sizes, widths)
        self.tables = self.scores if tied else _tables(self.sizes, widths)
        self.up = nn.ModuleList(nn.Linear(w, width, bias=False) for w in widths[1:])
        self.down = nn.ModuleList(nn.Linear(width, w, bias=False) for w in widths[1:])
        self.log_softmax = nn.LogSoftmax(-1)
        self.rare = nn.Linear(width, len(cutoffs), bias=False) if cutoffs else None

    def embed(self, tokens: Tensor, cluster: int | None) -> Tensor:
        """[B, T] -> [B, T, width]; the tokens of one cluster count from its first."""
        if cluster is not None or not self.cutoffs:
            return self._vectors(tokens, cluster or 0)
        vectors = torch.empty(0)
        for i, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            offset = tokens - start if start else tokens
            index = offset.clamp(0, size - 1)
            found = self._vectors(index, i)
            vectors = torch.where((index == offset).unsqueeze(-1), found, vectors) if i else found
        return vectors

    def _vectors(self, tokens: Tensor, cluster: int) -> Tensor:
        vectors = F.embedding(tokens, cast(Tensor, self.tables[cluster].weight))
        return cast(Tensor, self.up[cluster - 1](vectors)) if cluster else vectors

    def log_probabilities(self, x: Tensor, cluster: int | None) -> Tensor:
        """[B, T, width] -> [B, T, words], or those of one cluster alone."""
        scores = self.scores[0](x)
        if self.rare is None:
            return cast(Tensor, self.log_softmax(scores))
        head = self.log_softmax(torch.cat([scores, self.rare(x)], -1))
        frequent, rare = head[..., : self.sizes[0]], head[..., self.sizes[0] :]
        wanted = range(len(self.sizes)) if cluster is None else [cluster]
        parts = [
            rare[..., i - 1 : i] + self.log_softmax(self.scores[i](self.down[i - 1](x))) if i else frequent
            for i in wanted
        ]
        return torch.cat(parts, -1)


def _tables(sizes: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, size, bias=False) for size, width in zip(sizes, widths, strict=True))


class LanguageModel(nn.Module):
    """A vocabulary around a body that maps vectors [B, T, width] and state to vectors and state."""

    def __init__(self, words: Words, body: nn.Module, context: int | None) -> None:
        super().__init__()
        self.words = words
        self.body = body
        self.context = context
        self.cutoffs = words.cutoffs

    def forward(self, tokens: Tensor, state: Any = None, cluster: int | None = None) -> tuple[Tensor, Any]:
        x, state = self.body(self.words.embed(tokens, cluster), state)
        return self.words.log_probabilities(x, cluster), state


# --- LSTM -------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """A long short-term memory (Hochreiter and Schmidhuber 1997, with a forget gate) out of two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 4 * hidden)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, T, width] -> [B, T, hidden]; the state is output and memory, [B, hidden] each."""
        if state is None:
            zeros = x.new_zeros(x.shape[0], self.recurrent.in_features)
            state = zeros, zeros
        h, c = state
        outputs = []
        for inputs in self.input(x).unbind(1):
            i, f, g, o = (inputs + self.recurrent(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h, c)


class Recurrent(nn.Module):
    """Layers of a cell and, with `projection`, a linear layer that brings its output back to that width."""

    def __init__(self, hidden: int, projection: int, layers: int) -> None:
        super().__init__()
        width = projection or hidden
        self.cells = nn.ModuleList(Cell(width, hidden) for _ in range(layers))
        self.projections = nn.ModuleList(
            nn.Linear(hidden, projection) if projection else nn.Identity() for _ in range(layers)
        )

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        after = []
        for cell, projection, before in zip(
            self.cells, self.projections, state or [None] * len(self.cells), strict=True
        ):
            x, now = cell(x, before)
            x = projection(x)
            after.append(now)
        return x, after


def lstm_lm(
    vocab: int = WORDS,
    hidden: int = 2048,
    projection: int = 512,
    layers: int = 1,
    tied: bool = True,
    cutoffs: Sequence[int] = (),
    factor: int = 4,
) -> nn.Module:
    """LSTM language model; the defaults are the baseline of WikiText-103. projection=0: none."""
    words = Words(vocab, projection or hidden, cutoffs, factor, tied)
    return LanguageModel(words, Recurrent(hidden, projection, layers), None)


# --- transformer ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention over the last `context` tokens, with one learned number a head for each distance.

    A bias by distance (Raffel et al. 2019, arXiv 1910.10683) keeps cached keys and values valid for ever, and as there
    the scores are not scaled: the weights of the queries do that.
    """

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.context = heads, context
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(heads, context))  # the farthest first
        with torch.no_grad():
            self.query_key_value.weight[:width] *= (width // heads) ** -0.5

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, T, width] -> the same; the cache has keys and values [B, heads, tokens before, width / heads]."""
        batch, length, width = x.shape
        parts = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        scores = query @ key.transpose(-1, -2) + self.bias(length, key.shape[2])
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        kept = max(0, key.shape[2] - self.context + 1)
        return self.out(mixed), (key[:, :, kept:], value[:, :, kept:])

    def bias(self, queries: int, keys: int) -> Tensor:
        """[heads, queries, keys]: the number for the distance, minus infinity outside of the window."""
        if queries == 1:
            return self.distance[:, None, self.context - keys :]
        positions = torch.arange(keys, device=self.distance.device)
        index = positions - positions[keys - queries :, None] + self.context - 1
        inside = (index >= 0) & (index < self.context)
        return self.distance[:, index.clamp(0, self.context - 1)].masked_fill(~inside, -torch.inf)


class Block(nn.Module):
    """Attention and two linear layers with a ReLU, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, context)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        attended, cache = self.attention(self.norm1(x), cache)
        x = x + attended
        return x + self.feed_forward(self.norm2(x)), cache


class Decoder(nn.Module):
    """Blocks and a last layer norm; the state is the cache of each block."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, context: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, hidden, context) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        after = []
        for block, cache in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, now = block(x, cache)
            after.append(now)
        return self.norm(x), after


def transformer_lm(
    vocab: int = WORDS,
    width: int = 512,
    layers: int = 8,
    heads: int = 8,
    hidden: int = 2048,
    context: int = 256,
    tied: bool = True,
    cutoffs: Sequence[int] = (),
    factor: int = 4,
) -> nn.Module:
    """Decoder-only transformer with a sliding window of `context` tokens; cutoffs make the vocabulary adaptive."""
    if width % heads:
        raise ValueError(f"width {width} is no multiple of {heads} heads")
    if context < 1:
        raise ValueError(f"context {context}: a token attends to itself at least")
    words = Words(vocab, width, cutoffs, factor, tied)
    return LanguageModel(words, Decoder(layers, width, heads, hidden, context), context)


# --- WikiText-103 -----------------------------------------------------------------------------------------------------


class Stream(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of one stream: tokens, and the token after each. The first token of the stream is only read."""

    def __init__(self, tokens: Tensor, piece: int) -> None:
        self.tokens, self.piece = tokens, piece

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.piece)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i >= len(self):
            raise IndexError(i)
        part = self.tokens[i * self.piece : (i + 1) * self.piece + 1].long()
        return part[:-1], part[1:]


def read_words(path: Path) -> Iterator[str]:
    """The words of a file, with <eos> at the end of each line."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield from line.split()
            yield "<eos>"


def vocabulary(path: Path) -> dict[str, int]:
    """Every word of a training text, the most frequent first, words that are as frequent in the order of the text."""
    state = path.stat()
    return _vocabulary(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)
def _vocabulary(path: Path, size: int, modified: int) -> dict[str, int]:
    """The last one is kept, as both splits need it, until its file is another."""
    return {word: i for i, (word, _) in enumerate(Counter(read_words(path)).most_common())}


def wikitext(root: Path | None, split: Split, words: int = WORDS, test_tokens: int = TEST_TOKENS) -> Dataset[Any]:
    """WikiText-103 as it is distributed, wiki.train.tokens and wiki.test.tokens in the folder wikitext-103 of `root`.

    The stream begins with an <eos> that is only read, so that every token of the file is predicted. Of the training
    text whole pieces only. `words` and `test_tokens` are what a complete set has.
    """
    folder = (root or Path("data")) / "wikitext-103"
    try:
        ids = vocabulary(folder / "wiki.train.tokens")
        path = folder / f"wiki.{split}.tokens"
        stream = itertools.chain(["<eos>"], read_words(path))
        tokens = torch.from_numpy(np.fromiter((ids[word] for word in stream), np.int32))
    except OSError as error:
        raise _missing(folder, f"not found ({error})") from None
    except UnicodeDecodeError as error:
        raise _missing(folder, f"damaged: {error}") from None
    except KeyError as error:
        raise _missing(folder, f"damaged: {path.name} has the word {error}, which wiki.train.tokens lacks") from None
    if len(ids) != words:
        raise _missing(folder, f"damaged: wiki.train.tokens has {len(ids):,} words, not {words:,}")
    if split == "train":
        return Stream(tokens[: (len(tokens) - 1) // PIECE * PIECE + 1], PIECE)
    if len(tokens) - 1 != test_tokens:
        raise _missing(folder, f"damaged: {path.name} has {len(tokens) - 1:,} tokens, not {test_tokens:,}")
    return Stream(tokens, PIECE)


def _missing(folder: Path, what: str) -> DataMissing:
    how = (
        "unpack wikitext-103-v1.zip (Merity et al. 2016) so that this folder has wiki.train.tokens and wiki.test.tokens"
    )
    return DataMissing(
        f"WikiText-103 in {folder}: {what}; {how}, or name another folder than data by --data or MICRONET_DATA"
    )


WIKITEXT103 = Task(
    name="wikitext103",
    description="WikiText-103, the next of 267,735 words (MicroNet Challenge 2019)",
    baseline="LSTM-2048, projection 512, tied",
    storage=159e6,
    math=318e6,
    metric="perplexity",
    threshold=35,
    input_shape=(1,),
    dataset=wikitext,
    tokens=TEST_TOKENS,
)
