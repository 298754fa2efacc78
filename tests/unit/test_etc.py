"""The files in etc/ that others read: systemd, udev. What can be told without them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.options import MountConfig
from erofs_twisted.tap import Options

ETC = Path(__file__).parents[2] / "etc"

MAKE_A_MOUNT_NAMESPACE = {
    *("PrivateMounts", "PrivateTmp", "PrivateDevices", "PrivateIPC", "IPCNamespacePath", "MountFlags"),
    *("ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset", "ProtectControlGroups"),
    *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs"),
    *("ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths"),
    *("BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "MountImages", "ExtensionImages"),
    *("ExtensionDirectories", "RootDirectory", "RootImage", "DynamicUser", "LogNamespace"),
}
"""systemd.exec(5): within one, a mount would not be seen by anybody else."""


def settings(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE)


def parsed(arguments: list[str]) -> MountConfig:
    options = Options()
    options.parseOptions(arguments)
    return options.config


class UnitTests(SynchronousTestCase):
    unit = ETC / "systemd" / "erofs-nbd@.service"

    def test_the_mount_appears_in_the_namespace_of_the_host(self) -> None:
        names = {name for name, _ in settings(self.unit)}
        self.assertEqual(set(), names & MAKE_A_MOUNT_NAMESPACE)

    def test_openssl_may_call_back_into_python(self) -> None:
        self.assertNotIn("MemoryDenyWriteExecute", {name for name, _ in settings(self.unit)})

    def test_the_command_is_one_that_twistd_takes_with_the_example_configuration(self) -> None:
        environment = dict(settings(ETC / "erofs-twisted" / "example.conf"))
        (command,) = (value for name, value in settings(self.unit) if name == "ExecStart")
        words = re.sub(r"\$\{?(\w+)\}?", lambda found: environment[found[1]], command).split()
        config = parsed(words[words.index("erofs-nbd") + 1 :])
        self.assertEqual(environment["IMAGE"], str(config.image.reference))
        self.assertEqual(environment["MOUNTPOINT"], config.mountpoint)

    def test_a_read_of_the_superblock_fails_by_itself_before_systemd_gives_up(self) -> None:
        (limit,) = (value for name, value in settings(self.unit) if name == "TimeoutStartSec")
        config = parsed(shlex.split("--image registry.example/app --mountpoint /mnt"))
        self.assertGreater(float(limit.removesuffix("s")), config.image.registry.io_timeout)


class UdevTests(SynchronousTestCase):
    def test_the_rules_sort_between_those_that_watch_and_those_that_look(self) -> None:
        (rules,) = (ETC / "udev").iterdir()
        order = ["60-block.rules", rules.name, "60-persistent-storage.rules"]
        self.assertEqual(sorted(order), order)

    def test_every_jump_has_its_label(self) -> None:
        (rules,) = (ETC / "udev").iterdir()
        text = rules.read_text()
        self.assertEqual(set(re.findall(r'GOTO="(\w+)"', text)), set(re.findall(r'LABEL="(\w+)"', text)))
