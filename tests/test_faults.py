"""Faults that the program must survive: some trials of each in `make test`, all of them in `make faults`.

The trials are in the modules faults_*.py. In most of them a run is interrupted and resumed, and its last checkpoint
must be equal, bit for bit, to that of an uninterrupted run, the reference.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import faults_adapters
import faults_checkpoints
import faults_environment
import faults_files
import faults_interruptions
import faults_settings
import faults_training
import pytest
from fault_table import FAULTS, Fault
from program import Harness

MODULES = (
    faults_checkpoints,
    faults_interruptions,
    faults_training,
    faults_environment,
    faults_adapters,
    faults_files,
    faults_settings,
)
"""Importing these modules fills the table."""

OTHER_TESTS = {
    "F02": ["test_checkpoint.py::test_dying_at_any_operation_of_a_save_leaves_the_old_or_new_checkpoint"],
    "F04": ["test_checkpoint.py::test_all_of_a_hundred_flipped_bits_are_detected"],
    "F17": [
        "test_cache.py::test_non_finite_encoder_output_is_refused_and_the_sample_named",
        "test_cache.py::test_a_nan_in_an_entry_is_refused_even_if_its_digest_is_right",
    ],
    "F19": [
        "test_cache.py::test_an_edited_caption_makes_one_prompt_again_and_no_image",
        "test_cache.py::test_a_replaced_image_of_equal_name_size_and_mtime_is_encoded_again",
        "test_cache.py::test_another_encoder_template_or_schema_makes_its_tensor_again",
    ],
    "F20": [
        "test_cache.py::test_processes_that_fill_one_cache_make_the_entries_of_a_single_one",
        "test_cache.py::test_a_killed_writer_leaves_no_truncated_entry",
    ],
    "F21": ["test_images.py -k truncated or no_images or cmyk or sixteen or alpha or exif or animations or thin"],
    "F22": ["test_images.py -k decompression_bomb"],
    "F23": ["test_layouts.py -k leads_outside", "test_layouts_folders.py -k link_out"],
    "F24": ["test_layouts.py -k every_fault or counts_all", "test_layouts_folders.py -k every_fault"],
    "F26": ["test_mlflow_server.py -k eight_processes or killed_while_creating"],
    "F27": ["test_tracking.py -k locked_database", "test_mlflow_server.py -k server_that"],
    "F30": ["test_checkpoint.py -k pickle", "test_cache.py -k pickle"],
    "F31": ["test_command_line.py -k hydra_would_load"],
    "F32": ["test_command_line.py -k secret or access_token", "test_tracking.py -k password"],
    "F35": ["test_tracking_stores.py -k another_store or deleted or refuses_writes or temporary_files"],
    "F36": ["test_signals.py -k signal"],
    "F38": ["test_links.py -k link"],
}
"""Tests in other files that `make faults` counts too, as arguments of pytest.

Each tests one part of the program, where this is more precise than a whole run.
"""


def trial_id(fault_and_trial: tuple[Fault, int]) -> str:
    fault, trial = fault_and_trial
    return f"{fault.number} {fault.what} [{trial}]"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("harness"))


@pytest.mark.parametrize(
    "fault_and_trial", [(fault, trial) for fault in FAULTS for trial in fault.in_make_test], ids=trial_id
)
def test_the_program_survives(fault_and_trial: tuple[Fault, int], harness: Harness):
    fault, trial = fault_and_trial
    fault.trial(harness, harness.new_folder(), trial)


@pytest.mark.parametrize("test", [test for tests in OTHER_TESTS.values() for test in tests])
def test_tests_that_make_faults_runs_in_other_files_exist(test: str):
    path, _, selection = test.partition(" -k ")
    file, _, name = path.partition("::")
    names = re.findall(r"^def (test_\w+)", (Path(__file__).parent / file).read_text(), re.MULTILINE)
    for word in selection.split(" or ") if selection else [name]:
        assert any(word in name for name in names), word


def main(numbers: list[str]) -> int:
    """Runs all trials of the faults with these numbers (default: of all faults) and prints how many succeeded."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        for fault in (fault for fault in FAULTS if not numbers or fault.number in numbers):
            succeeded = sum(succeeds(fault, trial, harness) for trial in range(fault.count))
            counts.append((succeeded, fault.count))
            print(f"{fault.number} {fault.what}: {succeeded}/{fault.count}", flush=True)
    for number, tests in OTHER_TESTS.items():
        for test in tests if not numbers or number in numbers else ():
            counts.append(run_tests(test))
            print(f"{number} {test}: {counts[-1][0]}/{counts[-1][1]}", flush=True)
    succeeded, total = map(sum, zip(*counts, strict=True))
    print(f"{succeeded}/{total}")
    return succeeded < total


def succeeds(fault: Fault, trial: int, harness: Harness) -> bool:
    try:
        fault.trial(harness, harness.new_folder(), trial)
    except Exception:
        print(f"{fault.number} {fault.what} [{trial}]")
        traceback.print_exc(file=sys.stdout)
        return False
    return True


def run_tests(test: str) -> tuple[int, int]:
    """Runs tests of another file. Returns how many passed, of how many; no tests at all count as one that failed."""
    name, _, selection = test.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", f"{Path(__file__).parent / name}", "-k", selection]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", output.splitlines()[-1])}
    if set(counts) != {"passed"}:
        print(output)
    return counts.get("passed", 0), sum(counts.values()) or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
