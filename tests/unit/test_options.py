"""The options of the plugin and of the commands, as users type them."""

from __future__ import annotations

import io
import os
import platform
import sys
from pathlib import Path
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from twisted.python import usage
from twisted.trial.unittest import SynchronousTestCase

from erofs_twisted.cli import commands
from erofs_twisted.options import IMAGE_OPTIONS, MOUNT_OPTIONS, OptionError, read_image_config
from erofs_twisted.registry.platform import Platform
from erofs_twisted.registry.tlssettings import TLSSettings
from erofs_twisted.tap import Options
from tests.certificates import make_authority, pem
from tests.commands import every_command

IMAGE = ("--image", "registry.example/app:1.2")
WHERE = ("--mountpoint", "/mnt")


def parse(*arguments: str) -> Options:
    options = Options()
    options.parseOptions(list(arguments))
    return options


class OptionsTestCase(SynchronousTestCase):
    def secret_file(self, content: str) -> str:
        path = self.mktemp()
        Path(path).write_text(content)
        return path

    def refuses(self, *arguments: str) -> str:
        """The message that these arguments, beside an image and a mount point, are refused with."""
        return str(self.assertRaises(usage.UsageError, parse, *IMAGE, *WHERE, *arguments))


class DefaultTests(OptionsTestCase):
    def test_an_image_and_a_mount_point_are_enough(self) -> None:
        config = parse(*IMAGE, *WHERE).config
        self.assertEqual("registry.example/app:1.2", str(config.image.reference))
        self.assertEqual(
            ("/mnt", False, "auto", "wait"), (config.mountpoint, config.mkdir, config.attach, config.on_stop)
        )
        self.assertEqual(
            (None, None, False, 120.0),
            (
                config.image.layer,
                config.image.registry.credentials,
                config.image.registry.plain_http,
                config.image.registry.io_timeout,
            ),
        )

    def test_the_platform_is_the_hosts_own(self) -> None:
        self.patch(platform, "machine", lambda: "aarch64")
        self.assertEqual(Platform.parse("linux/arm64"), parse(*IMAGE, *WHERE).config.image.platform)

    def test_root_keeps_cache_and_state_where_the_system_does(self) -> None:
        self.patch(os, "geteuid", lambda: 0)
        config = parse(*IMAGE, *WHERE).config
        self.assertEqual("/var/cache/erofs-twisted", str(config.image.cache_dir))
        self.assertEqual("/run/erofs-twisted", str(config.state_dir))

    def test_other_users_keep_cache_and_state_in_their_own_directories(self) -> None:
        self.patch(os, "geteuid", lambda: 1000)
        self.patch(os, "environ", {"XDG_CACHE_HOME": "/home/u/.cache", "XDG_RUNTIME_DIR": "/run/user/1000"})
        config = parse(*IMAGE, *WHERE).config
        self.assertEqual("/home/u/.cache/erofs-twisted", str(config.image.cache_dir))
        self.assertEqual("/run/user/1000/erofs-twisted", str(config.state_dir))

    def test_paths_are_absolute_as_a_daemon_changes_its_directory(self) -> None:
        config = parse(
            "--image", "oci:layout:1.2", "--mountpoint", "mnt", "--cache-dir", "c", "--state-dir", "s"
        ).config
        here = os.getcwd()
        self.assertEqual(f"oci:{here}/layout:1.2", str(config.image.reference))
        self.assertEqual(
            [f"{here}/{name}" for name in ("mnt", "c", "s")],
            [config.mountpoint, str(config.image.cache_dir), str(config.state_dir)],
        )


class GivenTests(OptionsTestCase):
    def test_each_option_of_the_device_reaches_its_settings(self) -> None:
        settings = parse(
            *IMAGE, *WHERE,
            "--nbd-io-timeout", "2000", "--nbd-timeout", "60", "--nbd-dead-conn-timeout", "7",
            "--nbd-backend-identifier", "mine", "--nbd-read-ahead", "128", "--nbd-max-request", "512",
        ).config.nbd  # fmt: skip
        self.assertEqual(
            (2000, 60, 7, "mine", 128, 512),
            (
                settings.io_timeout_ms,
                settings.timeout,
                settings.dead_conn_timeout,
                settings.backend_identifier,
                settings.read_ahead_kb,
                settings.max_sectors_kb,
            ),
        )

    def test_a_password_comes_from_a_file_without_its_last_line_end(self) -> None:
        file = self.secret_file("pass word\n")
        credentials = parse(
            *IMAGE, *WHERE, "--username", "me", "--password-file", file
        ).config.image.registry.credentials
        self.assertEqual(("me", "pass word"), (credentials.username, credentials.password))

    def test_a_password_comes_from_standard_input(self) -> None:
        self.patch(sys, "stdin", io.StringIO("secret\r\n"))
        credentials = parse(
            *IMAGE, *WHERE, "--username", "me", "--password-file", "-"
        ).config.image.registry.credentials
        self.assertEqual("secret", credentials.password)

    def test_the_cache_has_a_limit_if_one_is_given(self) -> None:
        self.assertIsNone(parse(*IMAGE, *WHERE).config.image.cache_size)
        for text, size in (("1000", 1000), ("512M", 512 << 20), ("20g", 20 << 30), ("1TiB", 1 << 40)):
            self.assertEqual(size, parse(*IMAGE, *WHERE, "--cache-size", text).config.image.cache_size)

    def test_a_trace_is_used_unless_told_otherwise(self) -> None:
        self.assertEqual("auto", parse(*IMAGE, *WHERE).config.image.trace)
        for choice in ("auto", "record", "off"):
            self.assertEqual(choice, parse(*IMAGE, *WHERE, "--trace", choice).config.image.trace)

    def test_logins_are_looked_for_where_the_environment_and_the_home_say(self) -> None:
        environ = {"DOCKER_CONFIG": "docker", "HOME": "/home/me", "PATH": "/bin"}
        self.patch(os, "environ", environ)
        logins = parse(*IMAGE, *WHERE).config.image.registry.logins
        self.assertFalse(logins.is_named)
        self.assertEqual(os.path.abspath("docker/config.json"), logins.paths[0])
        self.assertEqual("/home/me/.config/containers/auth.json", logins.paths[-1])

    def test_logins_may_be_in_a_named_file(self) -> None:
        file = self.secret_file('{"auths": {}}')
        logins = parse(*IMAGE, *WHERE, "--auth-file", os.path.relpath(file)).config.image.registry.logins
        self.assertEqual((True, (os.path.abspath(file),)), (logins.is_named, logins.paths))

    def test_authorities_are_in_a_file_that_is_found_from_everywhere(self) -> None:
        self.assertEqual(TLSSettings(), parse(*IMAGE, *WHERE).config.image.registry.tls)
        file = self.secret_file(pem(make_authority("a")[1]).decode())
        tls = parse(*IMAGE, *WHERE, "--tls-ca", os.path.relpath(file)).config.image.registry.tls
        self.assertEqual((os.path.abspath(file),), tls.authorities)

    def test_servers_that_are_not_verified_are_named_with_their_ports(self) -> None:
        tls = parse(
            *IMAGE, *WHERE, "--insecure-skip-verify", "a.example,[::1]:5000"
        ).config.image.registry.tls
        self.assertEqual({("a.example", 443), ("::1", 5000)}, tls.unverified)

    def test_the_shorthand_means_what_its_options_mean(self) -> None:
        config = parse(
            *IMAGE, *WHERE, "--oci=platform=linux/arm/v7,layer=3,username=me,password=a=b"
        ).config.image
        self.assertEqual(("linux/arm/v7", 3), (str(config.platform), config.layer))
        self.assertEqual(
            ("me", "a=b"), (config.registry.credentials.username, config.registry.credentials.password)
        )


class RefusedTests(OptionsTestCase):
    def test_a_named_file_of_logins_has_to_be_one(self) -> None:
        for path, said in (
            ("/nonexistent/auth.json", "/nonexistent/auth.json: No such file"),
            (self.secret_file('{"auths": "hush"}'), "auths and credHelpers are objects"),
            (self.secret_file("hush"), "it is not a JSON object"),
            ("/dev/null", "/dev/null: not a file"),
        ):
            error = self.assertRaises(usage.UsageError, parse, *IMAGE, *WHERE, "--auth-file", path)
            self.assertTrue(str(error).startswith("--auth-file: "), error)
            self.assertIn(said, str(error))
            self.assertNotIn("hush", str(error))

    def test_a_named_file_of_authorities_has_to_be_one(self) -> None:
        for path, said in (
            ("/nonexistent/ca.pem", "/nonexistent/ca.pem: No such file"),
            (self.secret_file("hush"), "no PEM certificate"),
            ("/dev/null", "/dev/null: not a file"),
        ):
            message = self.refuses("--tls-ca", path)
            self.assertTrue(message.startswith("--tls-ca: "), message)
            self.assertIn(said, message)

    def test_a_file_of_authorities_that_the_mount_would_hide_is_refused(self) -> None:
        file = os.path.abspath(self.secret_file(pem(make_authority("a")[1]).decode()))
        link = os.path.abspath(self.mktemp())
        os.symlink(os.path.dirname(file), link)
        for mountpoint in (os.path.dirname(file), os.path.dirname(os.path.dirname(file)), link):
            error = self.assertRaises(
                usage.UsageError, parse, *IMAGE, "--mountpoint", mountpoint, "--tls-ca", file
            )
            self.assertIn("below the mount point", str(error))

    def test_a_user_and_a_file_of_logins_are_one_too_many(self) -> None:
        who = ("--username", "me", "--password-file", self.secret_file("x"))
        file = ("--auth-file", self.secret_file("{}"))
        error = self.assertRaises(usage.UsageError, parse, *IMAGE, *WHERE, *who, *file)
        self.assertEqual("--auth-file: there is also a --username; give one of them", str(error))

    def test_an_image_and_a_mount_point_are_needed(self) -> None:
        for arguments, missing in ((IMAGE, "--mountpoint"), (WHERE, "--image")):
            error = self.assertRaises(usage.UsageError, parse, *arguments)
            self.assertTrue(str(error).startswith(f"{missing}: is missing"), error)

    def test_every_bad_value_is_refused_with_its_options_name(self) -> None:
        bad = {
            "--platform": ("linux", "", "linux/amd64/v1/x", "lin ux/amd64"),
            "--layer": ("-1", "x", "", "1.0", "٣"),
            "--io-timeout": ("0", "-3", "soon", "nan", "inf"),
            "--attach": ("loop", ""),
            "--cache-size": ("0", "-1", "20 G", "lots", "1P", ""),
            "--trace": ("on", "", "AUTO"),
            "--tls-ca": ("", "/"),
            "--insecure-skip-verify": ("", "https://a.example", "*", "a:0", "::1"),
            "--on-stop": ("never",),
            "--nbd-io-timeout": ("-1", "1s"),
            "--nbd-timeout": ("x",),
            "--nbd-dead-conn-timeout": ("x",),
            "--nbd-read-ahead": ("0", "65536"),
            "--nbd-max-request": ("2", "x"),
            "--cache-dir": ("",),
            "--state-dir": ("",),
            "--options": ("rw", "dev", "suid"),
        }
        for option, values in bad.items():
            for value in values:
                self.assertIn(f"{option}: ", self.refuses(f"{option}={value}"))

    def test_the_shorthand_refuses_what_it_does_not_know(self) -> None:
        cases = {
            "layer=0,colour=red": "unknown key 'colour'",
            "layer=0,layer=1": "layer= is given twice",
            "platform=": "platform= has no value",
            "layer": "layer= has no value",
            "": "unknown key ''",
        }
        for shorthand, message in cases.items():
            self.assertIn(f"--oci: {message}", self.refuses(f"--oci={shorthand}"))

    def test_an_option_and_its_shorthand_together_are_refused(self) -> None:
        self.assertIn("--oci: layer= is given twice", self.refuses("--layer", "0", "--oci=layer=0"))
        file = self.secret_file("x")
        message = self.refuses("--oci=username=me,password=p", "--password-file", file)
        self.assertIn("--password-file: the password is also in --oci", message)

    def test_half_of_the_credentials_is_refused_with_the_other_halfs_name(self) -> None:
        self.assertIn("--password-file: is missing", self.refuses("--username", "me"))
        self.assertIn("--username: is missing", self.refuses("--password-file", self.secret_file("x")))

    def test_a_password_file_that_gives_no_password_is_refused(self) -> None:
        self.assertIn("No such file", self.refuses("--username", "me", "--password-file", "/nonexistent"))
        self.assertIn("is empty", self.refuses("--username", "me", "--password-file", self.secret_file("\n")))

    def test_a_message_never_holds_the_password(self) -> None:
        message = self.refuses("--oci=username=me,password=hunter2", "--password-file", "/nonexistent")
        self.assertNotIn("hunter2", message)

    def test_an_argument_that_is_no_option_is_refused(self) -> None:
        self.assertIn("--image", self.refuses("registry.example/app"))

    @given(st.text(), st.sampled_from([option.name for option in IMAGE_OPTIONS if option.metavar]))
    def test_no_text_raises_anything_but_an_option_error(self, text: str, option: str) -> None:
        try:
            read_image_config("registry.example/app", {option: text})
        except OptionError as error:
            self.assertIn("--", str(error))


class EnvironmentTests(OptionsTestCase):
    """What is read beside the options."""

    def test_proxies_are_those_of_the_environment(self) -> None:
        with mock.patch.dict(os.environ, {"HTTPS_PROXY": "proxy.example:3128"}):
            proxy = parse(*IMAGE, *WHERE).config.image.registry.proxies.proxy_for("https://registry.example/")
        assert proxy is not None
        self.assertEqual("http://proxy.example:3128", proxy.url)

    def test_a_proxy_that_cannot_be_used_is_refused_by_its_variable(self) -> None:
        with mock.patch.dict(os.environ, {"HTTPS_PROXY": "socks5://me:hunter2@proxy.example"}):
            message = self.refuses()
        self.assertTrue(message.startswith("HTTPS_PROXY: proxies that speak socks5"), message)
        self.assertNotIn("hunter2", message)

    def test_an_image_on_disk_needs_no_proxy_that_can_be_used(self) -> None:
        with mock.patch.dict(os.environ, {"HTTPS_PROXY": "socks5://proxy.example"}):
            config = parse("--image", "oci:/srv/layout", *WHERE).config
        self.assertIsNone(config.image.registry.proxies.https)


class HelpTests(SynchronousTestCase):
    def test_twistds_help_explains_every_option(self) -> None:
        text = str(Options())
        for option in (*IMAGE_OPTIONS, *MOUNT_OPTIONS):
            self.assertIn(f"--{option.name}", text)

    def test_each_command_takes_the_plugins_options_by_the_same_names(self) -> None:
        known = {option.name for option in (*IMAGE_OPTIONS, *MOUNT_OPTIONS)} | {
            "fix",
            "json",
            "socket",
            "timeout",
            "lazy",
            "all",
            "follow",
            "size",
            "older-than",
            "dry-run",
        }
        for _, command in every_command(commands):
            for parameter in command.params:
                for spelling in parameter.opts:
                    if spelling.startswith("--"):
                        self.assertIn(spelling.removeprefix("--"), known)

    def test_serve_takes_every_option_of_an_image(self) -> None:
        spellings = {
            spelling for parameter in commands.commands["serve"].params for spelling in parameter.opts
        }
        self.assertEqual(set(), {f"--{option.name}" for option in IMAGE_OPTIONS} - spellings)
