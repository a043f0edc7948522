"""The baseline that any fine-tuned model has to beat: TF-IDF and logistic regression, learned from the same examples.

tf is 1 + ln(count) of words and pairs of words, idf is ln((1 + N) / (1 + df)) + 1, rows have length 1. The regression is
multinomial with an L2 penalty of 1/2 ||W||² (C = 1), and L-BFGS finds its one minimum. A word of a sentence is classified by
features of itself and its neighbours, weighted in the same way.

Shapes: N items, F features, C classes, K features of all items together.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = re.compile(r"\w\w+|[^\w\s]")
STEPS, HISTORY = 200, 10  # each step remembered is two copies of the weights


class TfIdf:
    """Lists of features as weighted rows; features of the training items only."""

    def __init__(self, items: Sequence[Sequence[str]], *, at_least: int = 1) -> None:
        df = Counter(feature for item in items for feature in set(item))
        self.index = {name: at for at, name in enumerate(sorted(name for name, n in df.items() if n >= at_least))}
        self.idf = [math.log((1 + len(items)) / (1 + df[name])) + 1 for name in self.index]

    def rows(self, items: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """(features_K, weights_K, where each item begins), as EmbeddingBag takes them."""
        features: list[int] = []
        weights: list[float] = []
        begins: list[int] = []
        for item in items:
            begins.append(len(features))
            counts = Counter(self.index[name] for name in item if name in self.index)
            row = {at: (1 + math.log(n)) * self.idf[at] for at, n in counts.items()}
            length = math.sqrt(sum(weight**2 for weight in row.values())) or 1.0
            features += list(row)
            weights += [weight / length for weight in row.values()]
        return torch.tensor(features, dtype=torch.int64), torch.tensor(weights), torch.tensor(begins)


class Linear:
    """A classifier of feature lists."""

    def __init__(
        self, items: Sequence[Sequence[str]], labels: Sequence[str], *, penalty: float = 1.0, at_least: int = 1
    ) -> None:
        self.labels = sorted(set(labels))
        number = {label: at for at, label in enumerate(self.labels)}
        self.tfidf = TfIdf(items, at_least=at_least)
        rows, truth_N = self.tfidf.rows(items), torch.tensor([number[label] for label in labels])
        self.weight_FC = torch.zeros(len(self.tfidf.index), len(self.labels), requires_grad=True)
        self.bias_C = torch.zeros(len(self.labels), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.weight_FC, self.bias_C], max_iter=STEPS, history_size=HISTORY, tolerance_grad=1e-4, tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (
                F.cross_entropy(self._logits(rows), truth_N, reduction="sum")
                + penalty / 2 * self.weight_FC.square().sum()
            )
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    def _logits(self, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        features_K, weights_K, begins_N = rows
        bags = F.embedding_bag(features_K, self.weight_FC, begins_N, mode="sum", per_sample_weights=weights_K)
        return bags + self.bias_C

    @torch.no_grad()
    def predict(self, items: Sequence[Sequence[str]]) -> list[str]:
        """The likeliest label of each."""
        return [self.labels[at] for at in self._logits(self.tfidf.rows(items)).argmax(-1).tolist()] if items else []


def text_features(text: str, pair: str | None = None) -> list[str]:
    """Words and pairs of neighbours; those of a second text are other features."""
    words = WORD.findall(text.lower())
    found = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
    return found if pair is None else [*found, *(f"2:{name}" for name in text_features(pair))]


def word_features(words: Sequence[str]) -> list[list[str]]:
    """For each word: itself, its neighbours, beginnings, ends and shape."""
    padded = ["<s>", "<s>", *words, "</s>", "</s>"]
    found = []
    for at, word in enumerate(words, start=2):
        shape = re.sub(r"(.)\1+", r"\1", re.sub(r"\d", "0", re.sub(r"[a-z]", "x", re.sub(r"[A-Z]", "X", word))))
        low = word.lower()
        near = [f"{by}:{padded[at + by].lower()}" for by in (-2, -1, 0, 1, 2)]
        ends = [f"p{n}:{low[:n]}" for n in (1, 2, 3)] + [f"s{n}:{low[-n:]}" for n in (1, 2, 3, 4)]
        found.append([*near, *ends, f"shape:{shape}", f"before:{padded[at - 1][:1].isupper()}", f"first:{at == 2}"])
    return found
