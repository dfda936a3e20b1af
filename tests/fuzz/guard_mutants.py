"""Faults that take a guard away: of templates, files, links, requests and threads."""

from __future__ import annotations

from fuzz.mutant import Mutant

_SANDBOX, _SANDBOX_TEST = "runtime/text/template_sandbox.py", "tests/runtime/text/test_template_sandbox.py::"
_IMPORT = "from jinja2.sandbox import ImmutableSandboxedEnvironment"
_PLACEHOLDERS, _IMAGES = "runtime/vision/placeholders.py", "tests/runtime/vision/test_image_requests.py::"
_TASKS, _THREADS = "runtime/tasks/registry.py", "tests/runtime/tasks/test_registry_threads.py::"
_PATHS, _WRITER, _LINKS = "export/deployment_paths.py", "export/writer.py", "tests/export/test_swapped_links.py::"
_LOADING, _SIZES = "training/models/loading.py", "tests/training/models/test_size_limit.py::"

GUARDS = [
    Mutant(
        "templates: no sandbox",
        _SANDBOX,
        _IMPORT,
        "from jinja2 import Environment as ImmutableSandboxedEnvironment",
        f"{_SANDBOX_TEST}test_ways_out_of_the_sandbox_are_closed",
    ),
    Mutant(
        "templates: a sandbox that lets values be changed",
        _SANDBOX,
        _IMPORT,
        "from jinja2.sandbox import SandboxedEnvironment as ImmutableSandboxedEnvironment",
        f"{_SANDBOX_TEST}test_the_sandbox_is_jinjas_immutable_one",
    ),
    Mutant(
        "templates: anything may be called",
        _SANDBOX,
        "elif not __self._may_call(__obj):",
        "elif not callable(__obj):",
        f"{_SANDBOX_TEST}test_functions_that_no_rule_prices_cannot_be_called",
    ),
    Mutant(
        "generation: only the smallest end id ends a row",
        "runtime/text_generator.py",
        "ends = (*base.eos_token_ids, ",
        "ends = (*sorted(base.eos_token_ids)[:1], ",
        "tests/runtime/generation/test_stop_texts.py::test_each_of_several_end_tokens_ends_a_row",
    ),
    Mutant(
        "images: too many placeholders in a prompt",
        _PLACEHOLDERS,
        "    if count != positions:",
        "    if count < positions:",
        f"{_IMAGES}test_request_that_cannot_be_answered_is_refused",
    ),
    Mutant(
        "images: too many placeholders in token ids",
        _PLACEHOLDERS,
        "        if count != expected:",
        "        if count < expected:",
        f"{_IMAGES}test_run_with_too_few_or_many_placeholders_is_refused",
    ),
    Mutant(
        "images: a tower that is exchanged while it is loaded",
        "runtime/vision/tower.py",
        "            verified.check_unchanged(undo=tower.close)\n",
        "",
        "tests/runtime/vision/test_exchanged_tower.py::test_tower_that_is_exchanged_while_it_is_loaded_is_not_used",
    ),
    Mutant(
        "checkpoints: use_safetensors dropped",
        _LOADING,
        '{"use_safetensors": True}',
        "{}",
        "tests/training/models/test_weight_files.py::test_pickled_weights_that_come_after_the_check_are_not_loaded",
    ),
    Mutant(
        "checkpoints: layers are not counted before the config is made",
        "training/models/weight_files.py",
        "    check_counts(config, len(tensors), name)\n",
        "",
        f"{_SIZES}test_hundreds_of_thousands_of_layers",
    ),
    Mutant(
        "checkpoints: numbers are not counted while modules are made",
        _LOADING,
        "            if stored is not None:\n",
        "            if False:\n",
        f"{_SIZES}test_hundreds_of_layers",
    ),
    Mutant(
        "checkpoints: layers of a GGUF file are not counted before its config is made",
        "training/models/gguf/checked.py",
        "        if isinstance(layers, int):",
        "        if layers is None:",
        "tests/training/models/test_gguf.py::test_refuses_layers_that_it_does_not_hold_before_the_config_is_made",
    ),
    Mutant(
        "tasks: no locks",
        _TASKS,
        "self._lock = threading.RLock()",
        'self._lock = type("NoLock", (), {"__enter__": lambda self: None, "__exit__": lambda *reason: None})()',
        f"{_THREADS}test_task_is_loaded_once",
    ),
    Mutant(
        "tasks: loaded without the lock",
        _TASKS,
        "            with self._lock:\n                self.check(name)",
        "            if True:\n                self.check(name)",
        f"{_THREADS}test_task_is_loaded_once",
    ),
    Mutant(
        "tasks: added without the lock",
        _TASKS,
        "        with self._lock:\n            if name in self._tasks and",
        "        if True:\n            if name in self._tasks and",
        f"{_THREADS}test_name_is_added_by_one_thread_alone",
    ),
    Mutant(
        "tasks: removed without the lock",
        _TASKS,
        "        with self._lock:\n            self._check_known(name)\n            self._tasks = ",
        "        if True:\n            self._check_known(name)\n            self._tasks = ",
        f"{_THREADS}test_name_is_removed_by_one_thread_alone",
    ),
    Mutant(
        "tasks: graphs opened without the lock",
        _TASKS,
        "        with self._lock:\n            if activation_key",
        "        if True:\n            if activation_key",
        f"{_THREADS}test_shared_adapter_graph_is_opened_once",
    ),
    Mutant(
        "links: folders are opened through links",
        _PATHS,
        "_FOLDER | os.O_NOFOLLOW",
        "_FOLDER",
        f"{_LINKS}test_folder_that_is_swapped_after_the_last_check",
    ),
    Mutant(
        "links: files are moved by their paths",
        _PATHS,
        "os.replace(source_name, target_name, src_dir_fd=left, dst_dir_fd=right)",
        "os.replace(root / source, root / target)",
        f"{_LINKS}test_folder_that_is_swapped_while_it_is_open",
    ),
    Mutant(
        "links: files are removed by their paths",
        _PATHS,
        "            os.unlink(name, dir_fd=folder)",
        "            os.unlink(root / relative)",
        f"{_LINKS}test_file_that_is_removed_below_a_swapped_folder",
    ),
    Mutant(
        "links: the manifest is read through a link",
        _WRITER,
        "read_manifest(folder, follow_links=False)",
        "read_manifest(folder)",
        f"{_LINKS}test_manifest_that_is_swapped_after_the_last_check",
    ),
    Mutant(
        "links: the lock is opened through a link",
        "export/deployment_lock.py",
        "_NO_LINKS = os.O_NOFOLLOW | os.O_CLOEXEC",
        "_NO_LINKS = os.O_CLOEXEC",
        f"{_LINKS}test_lock_that_is_swapped_after_the_check",
    ),
    Mutant(
        "links: the mode of what a link leads to is set",
        _PATHS,
        "_FILE = os.O_RDONLY | os.O_NOFOLLOW",
        "_FILE = os.O_RDONLY",
        f"{_LINKS}test_staged_file_that_is_swapped_after_it_was_hashed",
    ),
]
