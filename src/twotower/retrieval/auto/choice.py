"""`index=auto`: build what may fit, measure it with held-out queries, keep the best."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any, NamedTuple

from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.auto.card import Card, Tried, advice
from twotower.retrieval.auto.config import GB, AutoConfig, Preference
from twotower.retrieval.auto.measure import HeldOut, draw_queries, latency_ms, wilson
from twotower.retrieval.auto.proposals import FEW_ROWS, Proposal, exact_for, of_factory, propose
from twotower.retrieval.auto.tuning import tune
from twotower.retrieval.build import build_index
from twotower.retrieval.environment import environment
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.index import INDEXES, Modality, VectorIndex
from twotower.retrieval.scan.tiers import Tier
from twotower.settings import ConfigError, to_plain

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """The index that is kept, and what is known of it and of the others."""

    searched: VectorIndex
    card: Card


def choose(
    config: AutoConfig,
    store: EmbeddingStore,
    seed: int = 1,
    modality: Modality = Modality.images,
) -> Chosen:
    """Build and measure the indexes that may fit a store's pictures or captions; keep one.

    One is built after the other, and of those that were built only the best stays in memory,
    beside the exact index that recall is measured against.

    Raises:
        ConfigError: as `build_index`, or `candidates` names what no index can be.
    """
    rows, dim = len(store), store.manifest.dim
    asked = {name: value for name, value in to_plain(config).items() if value}
    # What is free changes with every index that is built.
    config = dataclasses.replace(config, max_memory_gb=config.memory / GB)
    proposals = _proposals(config, rows, dim)
    about: dict[str, Any] = {"rows": rows, "dim": dim, "searched": modality.name}
    about |= {"asked": asked, "memory": f"{config.max_memory_gb:.1f} GB"}
    if len(proposals) == 1 and isinstance(proposals[0].config, ExactConfig):
        return _exact_alone(config, proposals[0], store, seed, modality, about)
    about |= environment()  # FAISS gets as many threads as torch, before anything is timed
    measuring = _Measuring(config, store, seed, modality)
    best: tuple[Tried, VectorIndex] | None = None
    tried = []
    for proposal in proposals:
        entry, index = measuring.attempt(proposal)
        tried.append(entry)
        if index is not None and (
            best is None or measuring.order(entry) < measuring.order(best[0])
        ):
            best = entry, index
    if best is None:
        raise ConfigError(f"none of the indexes could be built: {tried[-1].note}")
    for entry in tried:
        if not entry.note and entry is not best[0]:
            entry.note = measuring.why_not(entry, best[0])
    card = Card(
        chosen=best[0].name,
        reason=measuring.why(best[0]),
        tried=tried,
        queries=measuring.description,
        about=about,
        target_recall=config.target_recall,
        k=config.recall_k,
        tuned_on=measuring.leading,
    )
    card.advice.extend(advice(card))
    return Chosen(best[1], card)


def _proposals(config: AutoConfig, rows: int, dim: int) -> list[Proposal]:
    if not config.candidates:
        return propose(rows, dim, config.memory, config.metric)
    return [
        exact_for(rows, dim, config.memory, config.metric)
        if name == "exact"
        else of_factory(name, rows, dim, config.metric)
        for name in dict.fromkeys(config.candidates)
    ]


def _exact_alone(
    config: AutoConfig,
    proposal: Proposal,
    store: EmbeddingStore,
    seed: int,
    modality: Modality,
    about: dict[str, Any],
) -> Chosen:
    started = time.perf_counter()
    index = build_index(proposal.config, store, modality=modality, seed=seed)
    seconds = time.perf_counter() - started
    why = (
        f"below {FEW_ROWS:,} rows a scan of all of them takes a fraction of a millisecond, and "
        "no other index finds more"
        if len(store) < FEW_ROWS
        else "it is the only candidate"
    )
    entry = Tried("exact", to_plain(index.config), seconds, index.nbytes / max(1, len(index)))
    card = Card(
        chosen="exact",
        reason=f"{why}; nothing was measured, as recall is 1 by construction",
        tried=[entry],
        queries="none",
        about=about,
        target_recall=config.target_recall,
        k=config.recall_k,
    )
    return Chosen(index, card)


class _Measuring:
    """The exact index of a store, queries of both kinds, and how candidates compare by them."""

    def __init__(
        self, config: AutoConfig, store: EmbeddingStore, seed: int, modality: Modality
    ) -> None:
        self._config, self._store, self._seed, self._modality = config, store, seed, modality
        self._exact = exact_for(len(store), store.manifest.dim, config.memory, config.metric)
        started = time.perf_counter()
        reference = build_index(self._reference_config(), store, modality=modality, seed=seed)
        assert isinstance(reference, ExactIndex)
        self._reference = reference
        self._reference_seconds = time.perf_counter() - started
        self._queries: dict[str, tuple[HeldOut, HeldOut]] = {}
        kinds = [
            ("text", Modality.texts, store.has_texts),
            ("image", Modality.images, store.has_images),
        ]
        for place, (name, kind, there) in enumerate(kinds):
            if there:
                drawn = draw_queries(
                    *(store, reference, kind, modality),
                    k=config.recall_k,
                    count=min(config.num_queries, len(store)),
                    seed=seed + place,
                )
                half = len(drawn) // 2
                self._queries[name] = drawn.part(slice(half)), drawn.part(slice(half, None))
        self.leading = next(iter(self._queries))

    def _reference_config(self) -> ExactConfig:
        config = self._exact.config
        assert isinstance(config, ExactConfig)
        if self._exact.bytes_per_vector * len(self._store) <= self._config.memory:
            return config
        log.warning("codes for an exact search do not fit the memory: recall is measured slowly")
        return dataclasses.replace(config, tier=Tier.reference)

    @property
    def description(self) -> str:
        """What the queries are, for the card."""
        what = {"text": "captions", "image": "pictures"}
        drawn = " and ".join(
            f"{len(parts[1]):,} {what[name]}" for name, parts in self._queries.items()
        )
        own = "pictures" if self._modality is Modality.images else "captions"
        return (
            f"{drawn} of the store, other than those that were tuned on; of {own}, which are rows "
            "of the index themselves, the own row counts neither as found nor as missed"
        )

    def attempt(self, proposal: Proposal) -> tuple[Tried, VectorIndex | None]:
        """Build, tune and measure one index; a note, and no index, if it falls out before."""
        entry = Tried(proposal.name, to_plain(proposal.config), 0.0, proposal.bytes_per_vector)
        gigabytes = proposal.bytes_per_vector * len(self._store) / GB
        if gigabytes * GB > self._config.memory:
            entry.note = f"not built: it would take some {gigabytes:,.2f} GB, beyond the memory"
            return entry, None
        log.info("trying %s", proposal.name)
        try:
            index = self._built(proposal, entry)
            self._measure(index, proposal, entry)
        except (ConfigError, MemoryError) as error:
            entry.note = f"not built: {str(error) or 'the memory is full'}"
            return entry, None
        log.info("%s: %s", proposal.name, entry.summary())
        return entry, index

    def _built(self, proposal: Proposal, entry: Tried) -> VectorIndex:
        if proposal.name == "exact":
            entry.build_seconds = self._reference_seconds
            return self._reference
        config = proposal.config
        started = time.perf_counter()
        if "rerank" in proposal.knobs:
            config = dataclasses.replace(config, rerank=1.0)  # type: ignore[call-arg]
        index = build_index(config, self._store, modality=self._modality, seed=self._seed)
        entry.build_seconds = time.perf_counter() - started
        return index

    def _measure(self, index: VectorIndex, proposal: Proposal, entry: Tried) -> None:
        def recall(name: str) -> float:
            return float(self._queries[name][0].recalls(index, self._reference).mean())

        target = self._config.target_recall
        limit = self._config.max_latency_ms
        if proposal.knobs and "image" in self._queries and self.leading == "text":
            # What tuning on pictures, as is usual, would have given.
            tune(index, proposal.knobs, lambda: recall("image"), target)
            entry.if_tuned_on_images = {
                name: float(parts[1].recalls(index, self._reference).mean())
                for name, parts in self._queries.items()
            }
        entry.tuned = tune(index, proposal.knobs, lambda: recall(self.leading), target)
        entry.config = to_plain(index.config)
        entry.recalls = {
            name: wilson(parts[1].recalls(index, self._reference))
            for name, parts in self._queries.items()
        }
        vectors = self._queries[self.leading][1].vectors
        entry.p50_ms, entry.p95_ms = latency_ms(index, vectors, self._config.recall_k)
        entry.bytes_per_vector = index.nbytes / len(index)
        entry.reaches = entry.recalls[self.leading].high >= target
        entry.quick = entry.p50_ms <= limit
        entry.fits = index.nbytes <= self._config.memory

    def order(self, entry: Tried) -> tuple[float, ...]:
        """The smaller the better: what meets everything first, then by the preference."""
        cost = entry.p50_ms if self._config.prefer is Preference.speed else entry.bytes_per_vector
        missed = not entry.reaches
        recall = -round(entry.recalls[self.leading].value, 3) if missed else 0.0
        return (not entry.fits, missed, not entry.quick, recall, cost)

    def why(self, entry: Tried) -> str:
        """Why the best one is the best."""
        problems = []
        if not entry.fits:
            problems.append("takes more than the memory")
        if not entry.reaches:
            problems.append(f"misses the target recall {self._config.target_recall:g}")
        if not entry.quick:
            problems.append(f"takes more than {self._config.max_latency_ms:g} ms")
        if problems:
            return (
                f"nothing meets target and budgets; this comes nearest, but {', '.join(problems)}"
            )
        what = "fastest" if self._config.prefer is Preference.speed else "smallest"
        return f"the {what} of those that reach the target within the budgets"

    def why_not(self, entry: Tried, best: Tried) -> str:
        """Why another one is not."""
        recall = entry.recalls[self.leading].value
        if not entry.fits:
            return "takes more than the memory"
        if not entry.reaches and best.reaches:
            return f"finds {recall:.3f} of the best for {self.leading} queries"
        if not entry.quick and best.quick:
            return f"takes {entry.p50_ms:.2f} ms, more than {self._config.max_latency_ms:g}"
        if self._config.prefer is Preference.memory:
            return f"takes {entry.bytes_per_vector:,.0f} bytes a vector"
        return f"takes {entry.p50_ms:.2f} ms, more than {best.p50_ms:.2f}"


@INDEXES.register("auto", AutoConfig)
def build_auto(config: AutoConfig, dim: int) -> VectorIndex:
    """An empty exact index: what is chosen where there is no store to measure with."""
    return INDEXES.build(ExactConfig(metric=config.metric), dim)
