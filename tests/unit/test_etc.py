"""The files in etc/ that others read: systemd, udev. What can be told without them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.control import SOCKET
from erofs_twisted.options import MountConfig, ServiceConfig
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


class Unit:
    """What holds of all units that mount."""

    unit: Path
    assertEqual: Any
    assertNotIn: Any

    def test_the_mount_appears_in_the_namespace_of_the_host(self) -> None:
        names = {name for name, _ in settings(self.unit)}
        self.assertEqual(set(), names & MAKE_A_MOUNT_NAMESPACE)

    def test_openssl_may_call_back_into_python(self) -> None:
        self.assertNotIn("MemoryDenyWriteExecute", {name for name, _ in settings(self.unit)})

    def test_nothing_unmounts_what_a_daemon_that_died_has_left(self) -> None:
        commands = [value for name, value in settings(self.unit) if name.startswith("Exec")]
        self.assertEqual([], [command for command in commands if "umount" in command])

    def test_a_daemon_that_died_is_followed_by_the_next_one_at_once_however_often(self) -> None:
        found = dict(settings(self.unit))
        self.assertEqual(
            ("on-failure", "100ms", "0"),
            (found["Restart"], found["RestartSec"], found["StartLimitIntervalSec"]),
        )

    def test_a_signal_that_kills_is_a_failure_though_systemd_calls_it_clean(self) -> None:
        # systemd.service(5), "Restart=": clean are 0 and SIGHUP, SIGINT, SIGTERM, SIGPIPE.
        forced = dict(settings(self.unit))["RestartForceExitStatus"]
        self.assertEqual({"SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE"}, {*forced.split()})

    def test_nbdfuse_is_not_told_to_end_beside_its_daemon(self) -> None:
        self.assertEqual("mixed", dict(settings(self.unit))["KillMode"])


class OneMountTests(Unit, SynchronousTestCase):
    unit = ETC / "systemd" / "erofs-nbd@.service"

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


class ManyMountsTests(Unit, SynchronousTestCase):
    unit = ETC / "systemd" / "erofs-nbd.service"

    def test_the_command_is_one_that_twistd_takes(self) -> None:
        (command,) = (value for name, value in settings(self.unit) if name == "ExecStart")
        options = Options()
        options.parseOptions([*command.split()[4:-1], "--cache-size", "100G"])
        self.assertIsInstance(options.config, ServiceConfig)

    def test_the_socket_is_where_the_commands_look_for_it(self) -> None:
        found = dict(settings(ETC / "systemd" / "erofs-nbd.socket"))
        (command,) = (value for name, value in settings(self.unit) if name == "ExecStart")
        self.assertIn("--state-dir=/run/erofs-twisted ", command)
        self.assertEqual(f"/run/erofs-twisted/{SOCKET}", found["ListenStream"])
        self.assertEqual(("0600", "0700"), (found["SocketMode"], found["DirectoryMode"]))

    def test_but_for_what_is_of_one_mount_the_units_agree(self) -> None:
        apart = {
            "Description",
            "ConditionPathExists",
            "EnvironmentFile",
            "ExecStart",
            "LoadCredential",
            "TimeoutStartSec",
        }
        apart |= {"After", "Environment", "Requires", "Also"}

        def common(unit: Path) -> list[tuple[str, str]]:
            return [each for each in settings(unit) if each[0] not in apart]

        self.assertEqual(common(OneMountTests.unit), common(self.unit))


class UdevTests(SynchronousTestCase):
    def test_the_rules_sort_between_those_that_watch_and_those_that_look(self) -> None:
        (rules,) = (ETC / "udev").iterdir()
        order = ["60-block.rules", rules.name, "60-persistent-storage.rules"]
        self.assertEqual(sorted(order), order)

    def test_every_jump_has_its_label(self) -> None:
        (rules,) = (ETC / "udev").iterdir()
        text = rules.read_text()
        self.assertEqual(set(re.findall(r'GOTO="(\w+)"', text)), set(re.findall(r'LABEL="(\w+)"', text)))
