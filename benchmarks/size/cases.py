"""What is measured: models, and the engines that run each of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """An engine with a model in some bits.

    Attributes:
        name: key of its results.
        label: for people.
        engine: module of ``benchmarks.size.engines``.
        bits: what is asked for: a quantisation of the kit's (empty for float32, ``llama.cpp`` for a GGUF file as it
            is), a type of llama.cpp's, or a precision of onnxruntime-genai's builder.
        source: type of the GGUF file that it is made of; empty for the checkpoint.
    """

    name: str
    label: str
    engine: str
    bits: str
    source: str = ""

    @property
    def environment(self) -> str:
        """Which Python runs it: ``"kit"`` or ``"peers"``; llama.cpp's library is called through the kit's bindings."""
        return "peers" if self.engine == "genai" else "kit"


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
        name: key of its results; a size of ``seeded_model``, or ``"smollm2"``.
        label: for people.
        cases: who is measured.
        disk_gb: room that its files take at most.
        new_tokens: tokens that each row generates.
        rounds: processes of each case, the cases taking turns.
        export_rounds: exports, the tools taking turns.
        repeats: generations of each kind in a process; their median is kept.
    """

    name: str
    label: str
    cases: tuple[Case, ...]
    disk_gb: float
    new_tokens: int
    rounds: int = 3
    export_rounds: int = 1
    repeats: int = 1

    @property
    def is_real(self) -> bool:
        """Whether it has trained weights, and the example tasks with them."""
        return self.name == SMOLLM2


SMOLLM2 = "smollm2"
KIT_INT4 = Case("kit-int4", "AdaLink Kit, int4", "kit", "int4")
KIT_INT8 = Case("kit-int8", "AdaLink Kit, int8", "kit", "int8")
LLAMA = tuple(
    Case(f"llama-{kind.lower()}", f"llama.cpp, {kind}", "llama_cpp", kind) for kind in ("Q4_0", "Q4_K_M", "Q8_0")
)
GENAI = Case("genai-int4", "onnxruntime-genai, int4", "genai", "int4")
KIT_GGUF = tuple(
    Case(f"kit-gguf-{case.bits.lower()}", f"AdaLink Kit, codes of {case.bits}", "kit", "gguf", case.bits)
    for case in LLAMA
)
KIT_LLAMA = tuple(
    Case(f"kit-llama-{case.bits.lower()}", f"AdaLink Kit on llama.cpp, {case.bits}", "kit", "llama.cpp", case.bits)
    for case in LLAMA
)
KIT_FLOAT = Case("kit-float32", "AdaLink Kit, float32", "kit", "")
SHARED = (KIT_INT4, *LLAMA, GENAI)

MODELS = {
    model.name: model
    for model in (
        Model(
            SMOLLM2,
            "SmolLM2-135M",
            (*SHARED, KIT_INT8, *KIT_GGUF, *KIT_LLAMA, KIT_FLOAT),
            4,
            64,
            export_rounds=3,
            repeats=3,
        ),
        Model("0.5b", "0.5 billion, seeded", (*SHARED, KIT_INT8), 6, 48),
        Model("1b", "1.2 billion, seeded", SHARED, 10, 32),
        Model("3b", "3.1 billion, seeded", SHARED, 20, 16, rounds=2),
    )
}
# What a look at the numbers takes: some rows of each task alone.
QUICK_MODELS, QUICK_ROWS, QUICK_TOKENS = (SMOLLM2, "0.5b"), 50, 24


def quick(model: Model) -> Model:
    """The same for an impression: one round, and the engines that every model has."""
    return Model(model.name, model.label, SHARED, model.disk_gb, QUICK_TOKENS, rounds=1)
