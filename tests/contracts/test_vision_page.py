"""The figures of the benchmark of images in its guide are those of the newest run that was kept."""

from tests.contracts.doc_blocks import ROOT
from tests.contracts.test_ablation_page import percent
from tests.contracts.test_benchmark_page import newest

GUIDE = ROOT / "docs" / "guides" / "vision.md"
PAGE = " ".join(GUIDE.read_text(encoding="utf-8").split())


def test_accuracy_with_images_and_without_their_sense() -> None:
    found = newest("images")
    shape, accuracy = found["shape"], found["accuracy"]
    assert f"{shape['rows']} rows, {shape['epochs']} epochs and {shape['held_out']} held-out images" in PAGE
    for name, values in accuracy.items():
        assert f"| {name} | {percent(values[0])} | {percent(values[-1])} |" in PAGE
    assert "(vision.svg)" in PAGE
    assert "</svg>" in (GUIDE.parent / "vision.svg").read_text(encoding="utf-8")


def test_the_memory_of_many_rows() -> None:
    few, many = newest("epoch_images")["figures"]
    for found in (few, many):
        assert found["rows"] == found["rows_trained_on"] == found["images"]
        assert (
            f"| {found['rows']:,} | {found['steps']:,} | {found['push_s']:.0f} s | {found['job_s']:.0f} s | "
            f"{found['server_peak_mib']:,.0f} MiB | {found['job_peak_mib']:,.0f} MiB |" in PAGE
        )
    assert many["rows"] == 10_000
    for name, most in (("server_peak_mib", 60), ("job_peak_mib", 150)):
        assert many[name] - few[name] < most, "bounded"


def test_only_the_right_images_teach_the_colours() -> None:
    found = newest("images")
    assert found["accuracy"]["images in place"][-1] >= 0.9
    assert abs(found["accuracy"]["images shuffled"][-1] - 1 / found["shape"]["colours"]) < 0.15
