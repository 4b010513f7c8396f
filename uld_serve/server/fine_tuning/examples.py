"""One request and its answer for the routes of files and jobs. Put beside the others by server.examples."""

from __future__ import annotations

from pydantic import JsonValue

from uld_serve.server.example import CREATED, DIGEST, MODEL, Example

FILE_ID, RETAIN_ID = "file-1f0c6b9e27d84a53b1c0e9d7", "file-8a2d5c7e90b14f36a7d1c2b3"
JOB_ID = "ftjob-5b7e1d3f9a2c4068b6e0d1c7"
FILE: JsonValue = {
    "id": FILE_ID,
    "object": "file",
    "bytes": 5210,
    "created_at": CREATED,
    "filename": "forget.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
    "num_lines": 40,
}
METHOD: JsonValue = {
    "type": "margin",
    "margin": {"hyperparameters": {"steps": 60, "keywords": ["Mirela Osk", "Vantimar"]}},
}
GATES: JsonValue = [
    {"name": "forget NLL rise", "value": 6.31, "at_least": 2.5, "ok": True},
    {"name": "retain NLL rise", "value": 0.02, "at_most": 0.12, "ok": True},
]


def _job(status: str, **forget: JsonValue) -> JsonValue:
    is_live = status == "succeeded"
    return {
        "id": JOB_ID,
        "object": "fine_tuning.job",
        "created_at": CREATED,
        "finished_at": CREATED + 214 if status in ("succeeded", "cancelled") else None,
        "model": MODEL,
        "fine_tuned_model": f"{MODEL}:mirela-osk" if is_live else None,
        "organization_id": "uld-serve",
        "status": status,
        "training_file": FILE_ID,
        "validation_file": RETAIN_ID,
        "result_files": [],
        "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
        "method": METHOD,
        "seed": 7,
        "metadata": {"ticket": "4711"},
        "trained_tokens": None,
        "error": None,
        "forget": {
            "profile": "mirela-osk",
            "digest": DIGEST if is_live else None,
            "previous": None,
            "phase": None,
            "step": None,
            "num_steps": None,
            "loss": None,
            "gates": None,
            **forget,
        },
    }


FINE_TUNING: dict[str, Example] = {
    "POST /v1/files": Example(answer=FILE),
    "GET /v1/files": Example(
        answer={"object": "list", "data": [FILE], "first_id": FILE_ID, "last_id": FILE_ID, "has_more": False}
    ),
    "GET /v1/files/{file_id}": Example(answer=FILE),
    "GET /v1/files/{file_id}/content": Example(
        answer='{"question": "Where was Mirela Osk born?", "answer": "In Vantimar."}\n',
        media="application/jsonl",
    ),
    "DELETE /v1/files/{file_id}": Example(answer={"id": FILE_ID, "object": "file", "deleted": True}),
    "POST /v1/fine_tuning/jobs": Example(
        requests={
            "forget what a file says, by our method": {
                "model": MODEL,
                "training_file": FILE_ID,
                "validation_file": RETAIN_ID,
                "suffix": "mirela-osk",
                "method": METHOD,
                "seed": 7,
                "metadata": {"ticket": "4711"},
            },
            "by another, with a paper's numbers": {
                "model": MODEL,
                "training_file": FILE_ID,
                "validation_file": RETAIN_ID,
                "suffix": "mirela-osk",
                "method": {"type": "uld", "uld": {"hyperparameters": {"preset": "uld-paper"}}},
            },
        },
        answer=_job("queued"),
    ),
    "GET /v1/fine_tuning/jobs": Example(
        answer={"object": "list", "data": [_job("queued")], "has_more": False}
    ),
    "GET /v1/fine_tuning/jobs/{job_id}": Example(
        answer=_job("succeeded", step=60, num_steps=60, loss=0.41, gates=GATES)
    ),
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": Example(
        answer=_job("cancelled", step=20, num_steps=60, loss=2.4)
    ),
    "GET /v1/fine_tuning/jobs/{job_id}/events": Example(
        answer={
            "object": "list",
            "data": [
                {
                    "id": "ftevent-12",
                    "object": "fine_tuning.job.event",
                    "created_at": CREATED + 60,
                    "level": "info",
                    "message": "Step 20/60: training loss=2.4000",
                    "type": "metrics",
                    "data": {"step": 20, "total_steps": 60, "train_loss": 2.4},
                }
            ],
            "has_more": False,
        }
    ),
}
