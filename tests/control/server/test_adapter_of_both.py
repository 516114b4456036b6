"""A job whose model is another job's adapter and whose experts come from an analysis gets both, or an error."""

from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import NewJob
from llama_stack_provider_moe.jobdir.folder import JobFolder
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.routing import REPORT_FILE
from tests.control.server.test_model_names import LORA, leave, refusal, service, trained
from tests.support.routing_reports import report_of

__all__ = ["service"]


def test_neither_the_start_nor_the_analysis_is_dropped(service: PostTrainingService) -> None:
    """The saved adapter has LoRA on other experts, so the job is refused for its start, which was dropped before."""
    begun, analysis = trained(service, "adapter"), "analysis"
    folder = JobFolder(service.config.jobs_dir / analysis)
    folder.root.mkdir()
    service.store.add(NewJob(analysis, "anonymous", "routing_analysis", "owner/name", str(folder.root), 0))
    service.store.move(analysis, JobState.IN_PROGRESS)
    service.store.move(analysis, JobState.COMPLETED, artifacts=(leave(service, analysis, "routing"),))
    (folder.routing / REPORT_FILE).write_text(report_of({(1, 0): 0.5}).model_dump_json())
    found = {"job": analysis, "set": "a", "top": 1}
    told = refusal(service, 400, model=begun, adapter={**LORA, "plan": "per_expert", "from_analysis": found})
    assert "init_from" in told
