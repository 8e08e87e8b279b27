"""Layers of every compressor and quirk: the digests that reference programs gave, and what an oracle says."""

from __future__ import annotations

import dataclasses

import pytest

from snapshotter.units import sha256_digest
from snapshotter.ztoc.build import BuiltZtoc, build
from snapshotter.ztoc.serialize import serialize
from tests.support import corpus, ztoc_oracle

FACTS = [fact for fact in corpus.facts() if fact.name != corpus.CONVERTED]
CASES = {case.name: case for case in corpus.CASES}


def built(case: corpus.Case) -> BuiltZtoc:
    return build(case.chunks(), algorithm=case.algorithm, span_size=case.span_size, build_tool="oracle")


@pytest.mark.parametrize("name", CASES)
def test_the_reference_s_digests(name: str) -> None:
    case = CASES[name]
    made = built(case)
    digests = {
        (version, made.layer_digest): sha256_digest(
            serialize(dataclasses.replace(made.ztoc, build_tool=corpus.build_tool(version)))
        )
        for version in corpus.VERSIONS
        if corpus.trusted(case, version)
    }
    assert digests == {(fact.version, fact.layer): fact.ztoc for fact in FACTS if fact.name == name}


@pytest.mark.parametrize("name", [case.name for case in corpus.CASES if case.wrong_in])
def test_the_oracle_where_a_reference_is_wrong(name: str) -> None:
    blob = b"".join(CASES[name].chunks())
    expected = ztoc_oracle.build(blob, CASES[name].span_size, "oracle")
    assert built(CASES[name]).digest == sha256_digest(expected)


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) == len(corpus.CASES) >= 25
    assert {fact.name for fact in FACTS} <= CASES.keys()
    kept = [path.stat().st_size for path in corpus.DIRECTORY.iterdir()]
    assert sum(kept) < 2 << 20
