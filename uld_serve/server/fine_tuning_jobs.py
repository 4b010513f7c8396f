"""/v1/fine_tuning/jobs: profiles made on request. A job trains in a process of its own and its profile goes live
when its probes pass. Reaches no engine."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI
from starlette.responses import Response

from uld_serve.errors import InvalidRequest
from uld_serve.server.admission import Parse
from uld_serve.server.door import Enter, Visitor
from uld_serve.server.fine_tuning.protocol import JOB_REFUSED, JobRequest
from uld_serve.server.fine_tuning.shapes import (
    EventList,
    JobList,
    JobObject,
    event_id,
    event_object,
    job_object,
)
from uld_serve.server.paging import page_of
from uld_serve.server.responses import json_response

DEFAULT_LISTED, MAX_LISTED = 20, 100
ROOT = "/v1/fine_tuning/jobs"
ENTER = Enter()
ENTER_WITH_BODY = Enter(takes_body=True)
LIST = Enter(query=("after", "limit"))
PARSE = Parse(JobRequest, refused=JOB_REFUSED)

TheVisitor = Annotated[Visitor, Depends(ENTER)]
Lister = Annotated[Visitor, Depends(LIST)]


def add_routes(app: FastAPI) -> None:
    app.add_api_route(ROOT, create_job, methods=["POST"], response_model=JobObject)
    app.add_api_route(ROOT, list_jobs, methods=["GET"], response_model=JobList)
    app.add_api_route(f"{ROOT}/{{job_id}}", get_job, methods=["GET"], response_model=JobObject)
    app.add_api_route(f"{ROOT}/{{job_id}}/cancel", cancel_job, methods=["POST"], response_model=JobObject)
    app.add_api_route(f"{ROOT}/{{job_id}}/events", list_events, methods=["GET"], response_model=EventList)


async def create_job(
    visitor: Annotated[Visitor, Depends(ENTER_WITH_BODY)], request: Annotated[JobRequest, Depends(PARSE)]
) -> Response:
    """Queues a training of the profile `suffix`, of what `training_file` says, which is to be forgotten, beside what
    `validation_file` says, which is to stay. When its probes pass it goes live under that name, from one request to the
    next; when they do not, what served before serves on."""
    if visitor.catalog.profiles_of_model(request.model):
        raise InvalidRequest("model: name the base alone; the profile's name is the suffix", param="model")
    job = await visitor.workshop.submit(visitor.policy, request)
    return json_response(job_object(job, model=visitor.catalog.model))


async def list_jobs(visitor: Lister) -> Response:
    """This key's jobs, newest first; an admin's key lists all. `after` and `limit` as OpenAI has them."""
    jobs = visitor.workshop.jobs(visitor.policy)[::-1]
    page = page_of(jobs, visitor.query, id_of=lambda job: job.id, default=DEFAULT_LISTED, most=MAX_LISTED)
    data = [job_object(job, model=visitor.catalog.model) for job in page.items]
    return json_response(JobList(object="list", data=data, has_more=page.has_more))


async def get_job(job_id: str, visitor: TheVisitor) -> Response:
    """One of them."""
    job = visitor.workshop.job(visitor.policy, job_id)
    return json_response(job_object(job, model=visitor.catalog.model))


async def cancel_job(job_id: str, visitor: TheVisitor) -> Response:
    """Ends it, and its process; 409 once it has ended or is going live."""
    job = await visitor.workshop.cancel(visitor.policy, job_id)
    return json_response(job_object(job, model=visitor.catalog.model))


async def list_events(job_id: str, visitor: Lister) -> Response:
    """What happened to it, newest first, its losses too. `after` and `limit` as OpenAI has them."""
    events = visitor.workshop.events(visitor.policy, job_id)[::-1]
    page = page_of(events, visitor.query, id_of=event_id, default=DEFAULT_LISTED, most=MAX_LISTED)
    return json_response(
        EventList(object="list", data=[event_object(event) for event in page.items], has_more=page.has_more)
    )
