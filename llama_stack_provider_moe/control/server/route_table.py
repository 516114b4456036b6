"""What a host's start asks of our routes (`late_routes`), made by `python -m tests.contracts.route_table`."""

from llama_stack_provider_moe.control.server.late_routes import Row

# One of them begins each path. The routes of the first two are the same.
PREFIXES = ("/v1alpha/post-training", "/v1/post-training", "/v1/fine_tuning", "/moe")
_TWICE = PREFIXES[:2]
_UNDER_BOTH = (
    Row("/supervised-fine-tune", ("POST",), "supervised_fine_tune"),
    Row("/preference-optimize", ("POST",), "preference_optimize"),
    Row("/jobs", ("POST",), "submit"),
    Row("/jobs/validate", ("POST",), "validate"),
    Row("/jobs", ("GET",), "jobs"),
    Row("/jobs/{job_uuid}", ("PATCH",), "change"),
    Row("/jobs/{job_uuid}", ("GET",), "detail"),
    Row("/jobs/{job_uuid}/status", ("GET",), "status"),
    Row("/jobs/{job_uuid}/cancel", ("POST",), "cancel"),
    Row("/jobs/{job_uuid}/resume", ("POST",), "resume"),
    Row("/jobs/{job_uuid}", ("DELETE",), "delete"),
    Row("/jobs/{job_uuid}/artifacts", ("GET",), "artifacts"),
    Row("/jobs/{job_uuid}/artifacts/{name}", ("GET",), "files"),
    Row("/jobs/{job_uuid}/artifacts/{name}/{path:path}", ("GET",), "file"),
    Row("/jobs/{job_uuid}/exports", ("POST",), "export"),
    Row("/jobs/{job_uuid}/exports", ("GET",), "exports"),
    Row("/jobs/{job_uuid}/logs", ("GET",), "logs"),
    Row("/jobs/{job_uuid}/metrics", ("GET",), "metrics"),
    Row("/jobs/{job_uuid}/events", ("GET",), "events"),
    Row("/jobs/{job_uuid}/report", ("GET",), "job_report"),
    Row("/overview", ("GET",), "overview"),
    Row("/figures", ("GET",), "figures"),
    Row("/jobs/{job_uuid}/routing", ("GET",), "routing"),
    Row("/jobs/{job_uuid}/routing/shares", ("GET",), "routing_of_all_layers"),
    Row("/templates", ("GET",), "templates"),
    Row("/schema", ("GET",), "schema"),
    Row("/jobs/plan", ("POST",), "plan"),
    Row("/jobs/{job_uuid}/samples", ("GET",), "samples_of"),
    Row("/jobs/{job_uuid}/prompts", ("POST",), "send"),
    Row("/jobs/{job_uuid}/prompts", ("GET",), "standing"),
    Row("/jobs/{job_uuid}/prompts/{number}", ("GET",), "answer"),
    Row("/jobs/{job_uuid}/prompts/{number}", ("DELETE",), "stop"),
    Row("/job/status", ("GET",), "status"),
    Row("/job/artifacts", ("GET",), "artifacts"),
    Row("/job/cancel", ("POST",), "cancel"),
    Row("/datasets", ("GET",), "datasets"),
    Row("/datasets/{name}", ("PUT",), "put"),
    Row("/feedback", ("GET",), "feedback"),
    Row("/feedback", ("POST",), "make"),
    Row("/feedback", ("DELETE",), "erase"),
    Row("/datasets/{name}", ("GET",), "dataset"),
    Row("/datasets/{name}/profile", ("GET",), "profile"),
    Row("/datasets/{name}/rows", ("GET",), "rows"),
    Row("/datasets/{name}", ("DELETE",), "delete"),
    Row("/sweeps", ("POST",), "create"),
    Row("/sweeps", ("GET",), "sweeps"),
    Row("/sweeps/{sweep_uuid}", ("GET",), "sweep"),
    Row("/sweeps/{sweep_uuid}/cancel", ("POST",), "cancel"),
    Row("/sweeps/{sweep_uuid}", ("DELETE",), "delete"),
    Row("/pipelines", ("POST",), "create"),
    Row("/pipelines/validate", ("POST",), "validate"),
    Row("/pipelines", ("GET",), "pipelines"),
    Row("/pipelines/{pipeline_uuid}", ("GET",), "pipeline"),
    Row("/pipelines/{pipeline_uuid}/cancel", ("POST",), "cancel"),
    Row("/pipelines/{pipeline_uuid}/resume", ("POST",), "resume"),
    Row("/pipelines/{pipeline_uuid}", ("DELETE",), "delete"),
    Row("/activity", ("GET",), "activity"),
    Row("/graders/validate", ("POST",), "validate"),
    Row("/graders/run", ("POST",), "run"),
    Row("/quota", ("GET",), "quota"),
    Row("/quotas", ("GET",), "quotas"),
    Row("/health", ("GET",), "health", is_public=True),
)
_PROMETHEUS = Row("/metrics", ("GET",), "metrics")
_OTHERS = (
    Row("/v1/fine_tuning/jobs", ("POST",), "create"),
    Row("/v1/fine_tuning/jobs", ("GET",), "listed"),
    Row("/v1/fine_tuning/jobs/{fine_tuning_job_id}", ("GET",), "retrieve"),
    Row("/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", ("POST",), "cancel"),
    Row("/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", ("POST",), "pause"),
    Row("/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", ("POST",), "resume"),
    Row("/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", ("GET",), "listed"),
    Row("/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", ("GET",), "checkpoints"),
    Row("/v1/fine_tuning/files/{file_id}", ("GET",), "described"),
    Row("/v1/fine_tuning/files/{file_id}/content", ("GET",), "content"),
    Row("/v1/fine_tuning/alpha/graders/validate", ("POST",), "validate"),
    Row("/v1/fine_tuning/alpha/graders/run", ("POST",), "run"),
    Row("/moe", ("GET",), "shell", is_public=True),
    Row("/moe/jobs/{job_uuid}", ("GET",), "shell", is_public=True),
    Row("/moe/compare", ("GET",), "shell", is_public=True),
    Row("/moe/sweeps", ("GET",), "shell", is_public=True),
    Row("/moe/sweeps/{sweep_uuid}", ("GET",), "shell", is_public=True),
    Row("/moe/pipelines", ("GET",), "shell", is_public=True),
    Row("/moe/pipelines/{pipeline_uuid}", ("GET",), "shell", is_public=True),
    Row("/moe/data", ("GET",), "shell", is_public=True),
    Row("/moe/data/{name}", ("GET",), "shell", is_public=True),
    Row("/moe/playground", ("GET",), "shell", is_public=True),
    Row("/moe/new", ("GET",), "shell", is_public=True),
    Row("/moe/static/{name}", ("GET",), "static", is_public=True),
)


def rows(prometheus: bool) -> list[Row]:
    """Return the table.

    Args:
        prometheus: whether the server has the route for Prometheus.
    """
    under = (*_UNDER_BOTH, _PROMETHEUS) if prometheus else _UNDER_BOTH
    return [*(row._replace(path=prefix + row.path) for prefix in _TWICE for row in under), *_OTHERS]
