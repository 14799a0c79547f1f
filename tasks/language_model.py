"""What the language models have in common: the next character of real text."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import SCALES, check_count, check_names, check_numbers
from tasks.base import Task, TaskConfig
from tasks.data.bundled import TEXTS, load_texts
from tasks.data.symbols import VOCABULARY
from tasks.instances import Options
from tasks.supervised import scaled

# Windows of a split on which it is scored, spread evenly over it.
SCORE_WINDOWS = 512


@dataclass(frozen=True)
class LanguageModel(TaskConfig):
    """Cross-entropy of each next character, in nats, over windows of text; abstract.

    96 symbols: printable ASCII, and one for all the rest. The constant predictor knows how
    frequent each is in the training text (the unigram entropy). The score is of 512 windows spread
    evenly over the split.

    Attributes:
      dataset: prose (English) or source (Python), or prose,source: an instance has one of them.
      length: characters predicted in each window.
      init_scale: factors, one of which an instance has, of the initial weights; empty: 1.
      batch_size: windows per batch, drawn with replacement.
    """

    dataset: str = "prose"
    length: int = 16
    init_scale: tuple[float, ...] = ()
    batch_size: int = 16

    def __post_init__(self):
        check_names(TEXTS, dataset=self.dataset)
        check_count(length=self.length, batch_size=self.batch_size)
        check_numbers(SCALES, init_scale=self.init_scale)

    def module(self) -> nn.Module:
        """The network: one-hot symbols ``[N, length, 96]`` -> logits of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} must define `module`.")

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Raises:
          ValueError: on an unknown data set, or windows longer than its splits.
        """
        del data_dir
        names, length = tuple(self.dataset.split(",")), self.length
        text, scales = load_texts(names), tuple(self.init_scale) or (1.0,)
        shortest = min(min(sizes) for sizes in text.sizes.values())
        if length >= shortest:
            raise ValueError(f"`length` must be below {shortest}, a split's, got {length}.")
        options = Options({"dataset": names, "init_scale": scales})
        module = self.module()

        def init(instance, key):
            params = module.init(key, jnp.zeros((1, length, VOCABULARY), jnp.float32))["params"]
            return scaled(params, options.value(instance, "init_scale", scales))

        def batch(instance, key, split):
            which = options.index(instance, "dataset")
            return text.batch(which, key, split, self.batch_size, length + 1)

        def loss(params, instance, batch, key):
            del instance, key
            # One-hot products differentiate to products, not to scatters.
            symbols = jax.nn.one_hot(batch, VOCABULARY, dtype=jnp.float32)
            log_probs = jax.nn.log_softmax(module.apply({"params": params}, symbols[:, :-1]))
            return -jnp.mean(jnp.sum(log_probs * symbols[:, 1:], axis=-1))

        def score(params, instance, split):
            which = options.index(instance, "dataset")
            windows = text.windows(which, split, length + 1, SCORE_WINDOWS)
            return {"loss": loss(params, instance, windows, None)}

        ends = np.cumsum(text.sizes["train"])[:-1]
        entropies = [_entropy(part) for part in np.split(np.asarray(text.symbols["train"]), ends)]

        return Task(
            options.sample,
            init,
            batch,
            loss,
            score,
            unit="nats per character",
            constant_loss=lambda instance: jnp.asarray(
                options.value(instance, "dataset", entropies), jnp.float32
            ),
        )


def _entropy(symbols: np.ndarray) -> float:
    """Of how frequent each symbol is, in nats."""
    shares = np.bincount(symbols) / len(symbols)
    return float(-np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
