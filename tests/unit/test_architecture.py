"""The house has floors: a module imports only from floors below its own (docs/design.md)."""

from __future__ import annotations

import ast
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

PACKAGE = Path(__file__).parents[2] / "erofs_twisted"

FLOORS: dict[int, list[str]] = {
    0: [
        "",
        "errors",
        "interfaces",
        "nbd",
        "nbd.wire",
        "nbd.errors",
        "nbd.handshake",
        "nbd.replies",
        "nbd.transmission",
        "registry",
        "registry.errors",
        "registry.reference",
        "registry.digest",
        "registry.platform",
        "registry.challenge",
        "registry.credentials",
        "registry.dockerconfig",
        "registry.manifest",
        "registry.contentrange",
        "registry.selection",
        "registry.retry",
        "registry.link",
        "registry.pace",
        "registry.urls",
        "registry.signedurl",
        "registry.tokens",
        "registry.realm",
        "registry.notices",
        "registry.hosts",
        "registry.settings",
        "registry.noproxy",
        "registry.proxies",
        "registry.connect",
        "registry.tlssettings",
        "registry.pem",
        "erofs",
        "erofs.superblock",
        "erofs.crc32c",
        "erofs.inode",
        "erofs.directory",
        "erofs.walk",
        "blocks",
        "blocks.chunks",
        "blocks.readahead",
        "blocks.trace",
        "blocks.link",
        "device",
        "device.uapi",
        "device.genl",
        "device.settings",
        "mount",
        "mount.options",
        "mount.mountinfo",
        "state",
        "state.records",
        "state.takeover",
        "doctor",
        "doctor.finding",
        "doctor.machine",
    ],
    1: [
        "nbd.protocol",
        "nbd.serving",
        "nbd.pages",
        "nbd.residency",
        "nbd.port",
        "nbd.transport",
        "nbd.server",
        "registry.auth",
        "registry.tokenserver",
        "registry.transport",
        "registry.blob",
        "registry.circuit",
        "registry.location",
        "registry.client",
        "registry.documents",
        "registry.layout",
        "registry.keychain",
        "registry.logins",
        "registry.credentialhelper",
        "registry.body",
        "registry.session",
        "registry.shared",
        "registry.answers",
        "registry.failures",
        "registry.resolution",
        "registry.store",
        "registry.referrers",
        "registry.host",
        "registry.probe",
        "registry.hostsdir",
        "registry.replicas",
        "registry.push",
        "registry.concurrency",
        "registry.keepalive",
        "registry.proxyagent",
        "registry.proxyfailures",
        "registry.tunnel",
        "registry.tls",
        "registry.pemfiles",
        "registry.clientpair",
        "registry.verdict",
        "registry.content",
        "registry.repository",
        "blocks.source",
        "blocks.fetch",
        "blocks.queue",
        "blocks.lanes",
        "blocks.requests",
        "blocks.waiting",
        "blocks.cache",
        "blocks.blobfile",
        "blocks.cached",
        "blocks.cachefiles",
        "blocks.survey",
        "blocks.header",
        "blocks.tracefile",
        "device.connector",
        "device.nbd",
        "device.fuse",
        "syscalls",
        "files",
        "ownerport",
        "pool",
        "steadyclock",
        "device.netlink",
        "device.driver",
        "device.loop",
        "device.machine",
        "device.nbdfuse",
        "mount.holders",
        "mount.mountpoint",
        "mount.watch",
        "state.journal",
        "process",
        "doctor.remains",
        "doctor.report",
    ],
    2: [
        "handover",
        "leftovers",
        "doctor.survey",
        "prefetch",
        "prefetch.fill",
        "prefetch.metadata",
        "prefetch.warmup",
        "options",
        "tracing",
        "waiting",
    ],
    3: ["succession", "image", "doctor.search", "doctor.examination"],
    4: [
        "devices",
        "control",
        "control.errors",
        "control.client",
        "control.server",
        "control.starting",
        "recentlines",
        "reclaiming",
    ],
    5: ["taking", "watchdog"],
    6: ["mounting"],
    7: ["mounts"],
    8: [
        "service",
        "mountsservice",
        "cachekeeping",
        "doctor.registry",
        "reattaching",
        "recording",
        "supervising",
        "tracereport",
        "inspection",
        "listing",
        "messages",
        "serving",
        "unmounting",
    ],
    9: ["running", "doctor.cures"],
    10: ["ending"],
    11: ["tap", "cli", "mounthelper"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
ROOTS = {"", "errors", "interfaces"}
CORRIDOR = {"syscalls", "pool", "files", "ownerport", "steadyclock"}
"""Of floor 1, and open to all of its rooms."""
NO_IO = {"twisted", "treq", "socket", "os", "time", "threading", "subprocess", "asyncio", "select"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of all that a module imports at run time, also within functions."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if is_for_types_only(node):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return found


def own(name: str, known: set[str]) -> str | None:
    """The module of ours that a dotted import names, without the package's name."""
    first, _, rest = name.partition(".")
    if first != "erofs_twisted":
        return None
    while rest and rest not in known:
        rest = rest.rpartition(".")[0]
    return rest


class ArchitectureTests(SynchronousTestCase):
    def test_every_module_has_a_floor(self) -> None:
        self.assertEqual(set(), set(modules()) - set(FLOOR))

    def test_a_module_imports_only_from_below_or_from_its_own_package(self) -> None:
        trees = modules()
        wrong = []
        for name, tree in trees.items():
            for imported in imports(tree):
                target = own(imported, set(trees))
                if target is None or target == name or target in ROOTS:
                    continue
                same_room = target.partition(".")[0] == name.partition(".")[0]
                lower = FLOOR[target] < FLOOR[name] or (target in CORRIDOR and FLOOR[target] == FLOOR[name])
                if not (lower or (same_room and FLOOR[target] == FLOOR[name])):
                    wrong.append(f"{name} imports {target}")
        self.assertEqual([], wrong)

    def test_the_ground_floor_does_no_input_or_output(self) -> None:
        wrong = []
        for name, tree in modules().items():
            if FLOOR.get(name) != 0 or name == "interfaces":
                continue
            wrong += [f"{name} imports {i}" for i in imports(tree) if i.partition(".")[0] in NO_IO]
        self.assertEqual([], wrong)

    def test_no_module_imports_the_global_reactor(self) -> None:
        allowed = {"tap", "running"}
        wrong = [
            name
            for name, tree in modules().items()
            if name not in allowed and "twisted.internet.reactor" in imports(tree)
        ]
        self.assertEqual([], wrong)
