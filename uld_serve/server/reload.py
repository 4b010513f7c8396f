"""New settings for a running server, on SIGHUP: keys, limits and the cache's sharing change for the requests that come
next; whatever else differs is refused by name and the old settings serve on. Built by command."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from fastapi import FastAPI

from uld_serve.errors import InvalidRequest, UldError
from uld_serve.server.audit import AuditLog
from uld_serve.server.keys import KeyRing
from uld_serve.server.listener import Listener
from uld_serve.server.settings import ServerSettings, check_profiles_exist

logger = logging.getLogger(__name__)

CHANGEABLE = frozenset({"keys", "keys_file", "limits", "cache"})


class Reloader:
    """`read` gives the settings as a start would, `ring` their keys and what a start would refuse about them."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        read: Callable[[], ServerSettings],
        ring: Callable[[ServerSettings], KeyRing],
        audit: AuditLog | None,
    ) -> None:
        self.settings = settings
        self._read = read
        self._ring = ring
        self._audit = audit

    def reload(self, apps: Sequence[FastAPI], listener: Listener) -> bool:
        """Whether the new settings hold now. Requests that run keep what they began with; nothing is half changed."""
        try:
            settings = self._read()
            self._require_changeable(settings)
            keys = self._ring(settings)
            if keys.is_open and not apps[0].state.catalog.keys.is_open:
                raise InvalidRequest("keys: none is left, and that would let everybody in")
            check_profiles_exist(settings.keys, apps[0].state.catalog.registry)
            if self._audit is not None:
                self._audit.reopen()
                self._audit.write("reloaded", keys=len(keys))
        except UldError as error:
            logger.error("the settings were not reloaded, the old ones hold: %s", error.message)
            return False
        for app in apps:
            app.state.catalog = replace(app.state.catalog, keys=keys, limits=settings.limits)
        listener.use_limits(settings.limits)
        self.settings = settings
        logger.warning("the settings were reloaded; there are %d keys", len(keys))
        return True

    def _require_changeable(self, settings: ServerSettings) -> None:
        differing = sorted(
            name
            for name in ServerSettings.model_fields
            if name not in CHANGEABLE and getattr(settings, name) != getattr(self.settings, name)
        )
        if differing:
            raise InvalidRequest(f"only a restart changes {', '.join(differing)}")
