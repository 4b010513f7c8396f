"""Ray Serve's question "which replica?", answered by affinity. Loaded by Ray in every process that holds a handle."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from uld_serve.fleet.affinity import preference


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """The key comes as the session id of the call. Ray tries the replicas in the order given here, passes over those
    that are full, and begins anew after a pause when all are."""

    def initialize_state(self, *, slack: int) -> None:
        self._slack = slack

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {name: known.get(replica.replica_id) or 0 for name, replica in named.items()}
        key = pending_request.metadata.session_id
        return [[named[name]] for name in preference(key, loads, slack=self._slack)]
