"""Faults put into a copy of the kit's source, each with the test that must fail then.

A test that passes whatever the code says is worth nothing; this list shows that these do not.
"""

from __future__ import annotations

from fuzz.guard_mutants import GUARDS
from fuzz.mutant import Mutant

_LIMITS = "tests/tools/parity/test_exact_limits.py::"
_OUTPUTS, _GENERATION = "tools/parity/checks/outputs.py", "tools/parity/checks/generation.py"
_NOISE = "tools/parity/reference/noise_floor.py"
_ADAPTER, _DECODING = "tools/parity/checks/adapter.py", "tests/runtime/storage/test_decoding.py::"
_NAMES = "tests/runtime/ort/test_open_session.py::"
_WRITER, _CACHE = "tests/export/test_writer.py::", "tests/runtime/storage/test_user_cache.py::"

_CHECKS = [
    Mutant(
        "parity: the top-1 margin loosened 100 times",
        _OUTPUTS,
        "bad = np.flatnonzero(~(row.margin <= 2 * limit))",
        "bad = np.flatnonzero(~(row.margin <= 200 * limit))",
        f"{_LIMITS}test_another_top_token_is_a_tie_up_to_twice_the_limit",
    ),
    Mutant(
        "parity: the limit of the divergence loosened 100 times",
        _OUTPUTS,
        "[limit**2 / 2 + _KL_ROUNDING for limit in limits]",
        "[50 * limit**2 + _KL_ROUNDING for limit in limits]",
        f"{_LIMITS}test_the_divergence_may_be_half_the_square_of_the_limit",
    ),
    Mutant(
        "parity: the best component of a decode step instead of the worst",
        _NOISE,
        "np.abs(one - other).max(axis=1)",
        "np.abs(one - other).min(axis=1)",
        f"{_LIMITS}test_a_step_deviates_by_its_worst_component",
    ),
    Mutant(
        "parity: the best component of a position instead of the worst",
        _OUTPUTS,
        "deviations.append(np.abs(mine - other).max(axis=1))",
        "deviations.append(np.abs(mine - other).min(axis=1))",
        f"{_LIMITS}test_one_logit_of_one_position_may_deviate_by_the_limit",
    ),
    Mutant(
        "parity: the best component of a row in a mixed batch instead of the worst",
        _NOISE,
        "np.abs(one - other).max(axis=1)",
        "np.abs(one - other).min(axis=1)",
        f"{_LIMITS}test_a_row_of_a_mixed_batch_deviates_by_its_worst_component",
    ),
    Mutant(
        "parity: ties of generated tokens loosened 100 times",
        _GENERATION,
        "steps = np.flatnonzero(~(margins <= 2 * limits))",
        "steps = np.flatnonzero(~(margins <= 200 * limits))",
        f"{_LIMITS}test_a_generated_token_is_a_tie_up_to_twice_the_limit",
    ),
    Mutant(
        "parity: more steps counted as ties",
        _GENERATION,
        "ties = int(((margins > 0) & (margins <= 2 * limits)).sum())",
        "ties = int(((margins > 0) & (margins <= 200 * limits)).sum())",
        f"{_LIMITS}test_a_generated_token_is_a_tie_up_to_twice_the_limit",
    ),
    Mutant(
        "parity: a ratio that is not a number counted as 0",
        _ADAPTER,
        "ratio = np.where(np.isnan(ratio), np.inf, ratio)",
        "ratio = np.where(np.isnan(ratio), 0.0, ratio)",
        f"{_LIMITS}test_a_component_that_is_no_number_is_found",
    ),
    Mutant(
        "parity: a deviation that is not a number counted as 0",
        _OUTPUTS,
        "np.nan_to_num(deviation / limit, nan=np.inf)",
        "np.nan_to_num(deviation / limit, nan=0.0)",
        "tests/tools/parity/test_report.py::test_the_worst_is_the_nearest_to_its_limit",
    ),
    Mutant(
        "parity: only positive unit vectors",
        _ADAPTER,
        "_PROBE_SCALES = (1.0, -1.0)",
        "_PROBE_SCALES = (1.0,)",
        f"{_LIMITS}test_a_weight_behind_a_dead_side_is_found",
    ),
    Mutant(
        "parity: only negative unit vectors",
        _ADAPTER,
        "_PROBE_SCALES = (1.0, -1.0)",
        "_PROBE_SCALES = (-1.0,)",
        f"{_LIMITS}test_a_weight_behind_a_dead_side_is_found",
    ),
    Mutant(
        "parity: the tolerance of an engine loosened 100 times",
        _NOISE,
        "NOISE_FACTOR = 16.0",
        "NOISE_FACTOR = 1600.0",
        f"{_LIMITS}test_the_limit_is_sixteen_times_the_larger_noise",
    ),
    Mutant(
        "parity: noise of another model counted as noise",
        _NOISE,
        "np.where(values <= most[name], values, np.nan)",
        "np.where(values <= most[name], values, values)",
        f"{_LIMITS}test_noise_that_is_another_model_passes_nothing",
    ),
    Mutant(
        "parity: outputs of too many positions cut off",
        _OUTPUTS,
        "ours = np.full_like(theirs, np.nan)",
        "ours = np.resize(ours, theirs.shape)",
        f"{_LIMITS}test_outputs_of_more_or_fewer_positions",
    ),
    Mutant(
        "parity: a measured value that is not a number passes",
        "tools/parity/report.py",
        "return Check(name, bool(measured <= limit)",
        "return Check(name, not measured > limit",
        "tests/tools/parity/test_report.py::test_limits",
    ),
    Mutant(
        "errors: values nested too deeply are not converted",
        "runtime/storage/decoding.py",
        "except RecursionError as error:",
        "except ZeroDivisionError as error:",
        f"{_DECODING}test_json_that_cannot_be_decoded",
    ),
    Mutant(
        "errors: text that is not UTF-8 is not converted",
        "runtime/storage/decoding.py",
        "    except (UnicodeDecodeError, UnicodeEncodeError) as error:\n        raise msgspec.DecodeError(",
        "    except (UnicodeDecodeError, UnicodeEncodeError) as error:\n        raise TypeError(",
        f"{_DECODING}test_toml_that_cannot_be_decoded",
    ),
    Mutant(
        "errors: integers of any length",
        "runtime/storage/decoding.py",
        "        _check_integers(values)\n",
        "",
        f"{_DECODING}test_toml_that_cannot_be_decoded",
    ),
    Mutant(
        "errors: ONNX Runtime's messages that are not UTF-8",
        "runtime/ort/errors.py",
        "return (RuntimeError, UnicodeDecodeError, *exceptions)",
        "return (RuntimeError, *exceptions)",
        f"{_NAMES}test_a_refusal_in_bytes_is_mapped",
    ),
    Mutant(
        "errors: names of a graph are not read when it is opened",
        "runtime/ort/open_session.py",
        "for node in (*session.get_inputs(), *session.get_outputs()):",
        "for node in ():",
        f"{_NAMES}test_names_that_are_not_utf8_are_refused",
    ),
    Mutant(
        "errors: metadata of a graph is not read when it is opened",
        "runtime/ort/open_session.py",
        "        _ = session.get_modelmeta().custom_metadata_map\n",
        "",
        f"{_NAMES}test_names_that_are_not_utf8_are_refused",
    ),
    Mutant(
        "security: the owner of the user's cache unchecked",
        "runtime/storage/user_cache.py",
        "(status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE)",
        "(not status.st_mode & _OTHERS_MAY_WRITE)",
        f"{_CACHE}test_what_another_user_owns_is_not_read",
    ),
    Mutant(
        "security: the mode of the user's cache unchecked",
        "runtime/storage/user_cache.py",
        "(status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE)",
        "(status.st_uid == os.geteuid())",
        f"{_CACHE}test_what_others_may_write_is_not_read",
    ),
    Mutant(
        "writer: the manifest not read again under the lock",
        "export/writer.py",
        "current = _read_own(folder) if current or (folder / MANIFEST_FILE).exists() else None",
        "current = current or None",
        f"{_WRITER}test_manifest_is_read_again_under_the_lock",
    ),
    Mutant(
        "writer: files not flushed before the manifest",
        "export/writer.py",
        "        _sync_all(staged.values())\n",
        "",
        f"{_WRITER}test_every_file_is_on_the_disk_before_the_manifest_that_needs_it",
    ),
    Mutant(
        "writer: new folders not flushed before the manifest",
        "export/writer.py",
        "        _sync_all(sorted({self.folder, *folders}))\n",
        "",
        f"{_WRITER}test_new_folders_are_on_the_disk_before_the_manifest_that_needs_them",
    ),
]

MUTANTS = [*_CHECKS, *GUARDS]
