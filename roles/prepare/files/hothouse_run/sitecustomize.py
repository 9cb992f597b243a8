"""What Python loads first in every command of hothouse-run: there Celery's applications get the deployment's settings.

Those are the application that HOTHOUSE_APP names, one that a process makes its default (`set_default()`, as factories
of Flask do), and one that has no broker of its own. Nothing of Celery is imported before the command does so itself.
"""

import os
import sys
from importlib.machinery import PathFinder

HERE = __file__.rpartition("/")[0]
TARGET = os.environ.get("HOTHOUSE_APP", "").replace(":", ".").rpartition(".")
BASE = "celery.app.base"
named = []


class Watch:
    """Lets a function see a module as soon as it is loaded, which it is as it would be without this."""

    def __init__(self, seen):
        self.seen = seen
        self.finding = set()

    def find_spec(self, name, path=None, target=None):
        if name not in self.seen or name in self.finding:
            return None
        from importlib.util import find_spec

        self.finding.add(name)
        try:
            spec = find_spec(name)
        finally:
            self.finding.discard(name)
        load = getattr(spec and spec.loader, "exec_module", None)
        if load:

            def exec_module(module):
                load(module)
                if module.__name__ == name:  # there are loaders for many modules
                    self.seen[name](module)

            spec.loader.exec_module = exec_module
        return spec


def settle(app):
    """Put the deployment's settings into an application whose own are loaded, if it is one of the deployment's."""
    from celery import _state

    if app in named or app is _state.default_app or not app.conf.broker_url:
        import hothouse_celery

        hothouse_celery.adopt(app)


def on_base(module):
    celery = module.Celery
    load_config, set_default = celery._load_config, celery.set_default

    def _load_config(self):
        load_config(self)
        settle(self)
        return self._conf

    def then_set_default(self):
        set_default(self)
        if self.configured:
            settle(self)

    celery._load_config, celery.set_default = _load_config, then_set_default


def on_target(module):
    app = getattr(module, TARGET[2], None)
    if app is not None:
        named.append(app)
        if getattr(app, "configured", False):
            settle(app)


sys.meta_path.insert(0, Watch({BASE: on_base, TARGET[0]: on_target}))

# Python loads one module of this name only: the one that it would have loaded.
spec = PathFinder.find_spec(__name__, [folder for folder in sys.path if folder.rstrip("/") != HERE])
if spec and spec.loader:
    from importlib.util import module_from_spec

    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
