"""A UR controller's network side in a process of its own: dashboard (29999), scripts (30002, 30003), RTDE (30004).

It speaks the published protocols (UR's RTDE guide, dashboard server manual) and does with commands what the control script
of ur-rtde does: registers in, servoing with a first-order lag, a watchdog that stops the program when its register goes
silent. What the arm was told and what it did goes to a file, so that a test can ask the arm itself.

usage: fake_ur.py ADDRESS LOG. Orders come on standard input, a word a line; "ready" is printed once it listens.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field

DASHBOARD, SCRIPTS, RTDE = 29999, (30001, 30002, 30003), 30004
STEP_S = 0.002
LAG_S = 0.05
SPEED = 1.05
"""Joint speed (rad/s) of the servo at most."""
HOME = [0.0, -1.57, 1.57, -1.57, -1.57, 0.0]
TCP = [-0.49, -0.13, 0.49, 2.2214, -2.2214, 0.0]
"""Position (m) and rotation vector (rad) in the controller's base, whatever the joints are: frames are tested, not kinematics."""

SIZES = {"DOUBLE": "d", "VECTOR6D": "6d", "INT32": "i", "UINT32": "I", "UINT64": "Q", "BOOL": "?", "UINT8": "B"}
SERVO, SERVO_STOP, WATCHDOG, STOP_SCRIPT = 11, 16, 35, 255
AT_ONCE = (SERVO, 9, 10)
"""Commands that the script takes without an answer."""


def kind_of(name: str) -> str:
    """RTDE type of a variable."""
    if "double_register" in name or name in ("timestamp", "speed_scaling", "target_speed_fraction"):
        return "DOUBLE"
    if "int_register" in name or name in ("robot_mode", "safety_mode"):
        return "INT32"
    if name in ("robot_status_bits", "safety_status_bits", "runtime_state"):
        return "UINT32"
    if "bit_registers" in name:
        return "UINT32"
    if name.startswith("actual_") or name.startswith("target_"):
        return "VECTOR6D"
    return "NOT_FOUND"


@dataclass
class Controller:
    """The controller box and its arm. Guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    q: list[float] = field(default_factory=lambda: list(HOME))
    qd: list[float] = field(default_factory=lambda: [0.0] * 6)
    target: list[float] | None = None
    program: bool = False
    protective_stop: bool = False
    cause: bool = False
    """What stopped the arm is still there, so that the stop cannot be released."""
    slider: float = 1.0
    tcp: list[float] = field(default_factory=lambda: list(TCP))
    ready: int = 0
    registers: dict[str, float] = field(default_factory=dict)
    handled: int = 0
    heard_s: float = 0.0
    watchdog_s: float = 0.0
    scripts: int = 0
    targets: list[list[float]] = field(default_factory=list)
    motion: list[list[float]] = field(default_factory=list)
    events: list[list[object]] = field(default_factory=list)

    def event(self, what: str) -> None:
        self.events.append([time.monotonic(), what])

    def value(self, name: str) -> list[float]:
        """What a variable is now."""
        status = 1 | (2 if self.program else 0)
        safety = 1 | (4 if self.protective_stop else 0)
        known: dict[str, list[float]] = {
            "timestamp": [time.monotonic()],
            "actual_q": self.q,
            "actual_qd": self.qd,
            "actual_TCP_pose": self.tcp,
            "target_q": self.target or self.q,
            "robot_status_bits": [status],
            "safety_status_bits": [safety],
            "runtime_state": [2 if self.program else 1],
            "robot_mode": [7],
            "safety_mode": [3 if self.protective_stop else 1],
            "speed_scaling": [1.0],
            "target_speed_fraction": [self.slider],
            "output_int_register_0": [self.ready],
        }
        return known.get(name, [self.registers.get(name, 0)] * (6 if kind_of(name) == "VECTOR6D" else 1))

    def load_script(self) -> None:
        """A program was sent: it runs from now on."""
        self.scripts += 1
        self.event("script")
        if self.protective_stop:
            return
        self.program, self.handled, self.watchdog_s, self.target, self.ready = True, 0, 0.0, None, 1

    def end_program(self, why: str) -> None:
        if self.program:
            self.event(f"program ended: {why}")
        self.program, self.target, self.ready, self.watchdog_s = False, None, 0, 0.0

    def command(self) -> None:
        """One turn of the script's loop."""
        number = int(self.registers.get("input_int_register_0", 0))
        if number in AT_ONCE:
            if number == SERVO:
                self.target = [self.registers.get(f"input_double_register_{i}", 0.0) for i in range(6)]
            self.ready = 1
        elif number == 0:
            self.handled, self.ready = 0, 1
        elif number != self.handled:
            self.handled = number
            if number == SERVO_STOP:
                self.event("servo stop")
                self.target = None
            elif number == WATCHDOG:
                self.watchdog_s = 1.0 / self.registers.get("input_double_register_0", 1.0)
                self.registers["output_int_register_1"] = 1
            elif number == STOP_SCRIPT:
                self.end_program("stop script")
                return
            else:
                self.event(f"command {number}")
            self.ready = 2

    def step(self, dt: float) -> None:
        """One step of script and arm."""
        with self.lock:
            now = time.monotonic()
            if self.program:
                self.command()
                if self.watchdog_s and now - self.heard_s > self.watchdog_s:
                    self.end_program("watchdog")
            before = list(self.q)
            if self.target is not None and self.program:
                for i, goal in enumerate(self.target):
                    rate = max(-SPEED, min(SPEED, (goal - self.q[i]) / LAG_S))
                    self.q[i] += rate * dt
            self.qd = [(a - b) / dt for a, b in zip(self.q, before, strict=True)]
            self.motion.append([now, *self.q])

    def order(self, word: str) -> None:
        with self.lock:
            if word == "protective_stop":
                self.protective_stop = True
                self.end_program("protective stop")
            elif word in ("cause", "no_cause"):
                self.cause = word == "cause"
            elif word == "unlock":
                self.protective_stop = False
            elif word == "stop_program":
                self.end_program("pendant")
            elif word.startswith("slider="):
                self.slider = float(word.split("=")[1])
            elif word.startswith("tcp="):
                self.tcp = [float(number) for number in word.split("=")[1].split(",")]
            else:
                self.event(f"unknown order {word}")

    def dump(self, path: str) -> None:
        """Write what the arm was told and did."""
        with self.lock:
            told = {
                "events": self.events,
                "targets": self.targets,
                "motion": self.motion[-20000:],
                "program": self.program,
                "scripts": self.scripts,
            }
            text = json.dumps(told)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def listen(address: str, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen(8)
    return server


def serve_dashboard(controller: Controller, connection: socket.socket) -> None:
    answers = {
        "polyscopeversion": "URSoftware 5.11.1.108318 (Oct 01 2021)",
        "is in remote control": "true",
        "robotmode": "Robotmode: RUNNING",
        "get serial number": "20195599999",
        "get robot model": "UR5",
    }
    connection.sendall(b"Connected: Universal Robots Dashboard Server\n")
    with connection, connection.makefile("r", encoding="ascii") as lines:
        for line in lines:
            word = line.strip().lower()
            with controller.lock:
                controller.event(f"dashboard: {word}")
                if word == "stop":
                    controller.end_program("dashboard")
                elif word == "unlock protective stop" and not controller.cause:
                    controller.protective_stop = False
                running, stopped = controller.program, controller.protective_stop
            answer = {
                "running": f"Program running: {str(running).lower()}",
                "programstate": "PLAYING steer.urp" if running else "STOPPED steer.urp",
                "safetystatus": f"Safetystatus: {'PROTECTIVE_STOP' if stopped else 'NORMAL'}",
                "stop": "Stopped",
                "unlock protective stop": "Cannot unlock protective stop" if stopped else "Protective stop releasing",
            }.get(word)
            connection.sendall((answer or answers.get(word, word)).encode() + b"\n")


def serve_scripts(controller: Controller, connection: socket.socket) -> None:
    """Programs arrive as text; one is whole when nothing more comes for a moment."""
    connection.settimeout(0.05)
    text = b""
    with connection:
        while True:
            try:
                data = connection.recv(65536)
            except TimeoutError:
                if text:
                    with controller.lock:
                        controller.load_script()
                    text = b""
                continue
            except OSError:
                return
            if not data:
                return
            text += data


class RtdeConnection:
    """One client of the real-time data exchange."""

    def __init__(self, controller: Controller, connection: socket.socket) -> None:
        self.controller, self.connection = controller, connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.outputs: list[str] = []
        self.period_s = 0.008
        self.inputs: dict[int, list[str]] = {}
        self.started = False
        self.sending = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self.stream, daemon=True).start()
        try:
            while True:
                size, command = struct.unpack(">HB", self.exactly(3))
                self.take(command, self.exactly(size - 3))
        except (OSError, EOFError):
            return
        finally:
            self.started = False
            self.connection.close()

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.connection.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def send(self, command: int, payload: bytes) -> None:
        with self.sending:
            self.connection.sendall(struct.pack(">HB", 3 + len(payload), command) + payload)

    def take(self, command: int, payload: bytes) -> None:
        match chr(command):
            case "V":
                self.send(command, b"\x01")
            case "v":
                self.send(command, struct.pack(">4I", 5, 11, 1, 108318))
            case "O":
                self.period_s = 1.0 / struct.unpack(">d", payload[:8])[0]
                self.outputs = [name for name in payload[8:].decode().split(",") if name]
                self.send(command, b"\x01" + ",".join(kind_of(name) for name in self.outputs).encode())
            case "I":
                names = [name for name in payload.decode().split(",") if name]
                number = len(self.inputs) + 1
                self.inputs[number] = names
                self.send(command, bytes([number]) + ",".join(kind_of(name) for name in names).encode())
            case "S":
                self.send(command, b"\x01")
                self.started = True
            case "P":
                self.started = False
                self.send(command, b"\x01")
            case "U":
                self.data(payload)

    def data(self, payload: bytes) -> None:
        names = self.inputs[payload[0]]
        values = struct.unpack(">" + "".join(SIZES[kind_of(name)] for name in names), payload[1:])
        controller = self.controller
        with controller.lock:
            controller.registers.update(zip(names, values, strict=True))
            controller.heard_s = time.monotonic()
            if controller.registers.get("input_int_register_0") == SERVO and "input_double_register_5" in names:
                servo = [float(value) for value in values[1:7]]
                controller.targets.append([time.monotonic(), *servo])

    def stream(self) -> None:
        while self.connection.fileno() >= 0:
            time.sleep(self.period_s)
            if not self.started:
                continue
            with self.controller.lock:
                body = b"".join(
                    struct.pack(">" + SIZES[kind_of(name)], *self.controller.value(name)) for name in self.outputs
                )
            try:
                self.send(ord("U"), b"\x01" + body)
            except OSError:
                return


def main() -> None:
    address, log = sys.argv[1:3]
    controller = Controller()
    selector = selectors.DefaultSelector()
    for port in (DASHBOARD, *SCRIPTS, RTDE):
        selector.register(listen(address, port), selectors.EVENT_READ, port)
    connections: list[socket.socket] = []

    def step() -> None:
        last = time.monotonic()
        while True:
            time.sleep(STEP_S)
            now = time.monotonic()
            controller.step(now - last)
            last = now

    def accept() -> None:
        while True:
            for key, _ in selector.select():
                connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                connections.append(connection)
                serve = {DASHBOARD: serve_dashboard, RTDE: lambda c, s: RtdeConnection(c, s).run()}.get(
                    key.data, serve_scripts
                )
                threading.Thread(target=serve, args=(controller, connection), daemon=True).start()

    threading.Thread(target=step, daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "dump":
            controller.dump(log)
            print("dumped", flush=True)
        elif word == "drop":
            for connection in connections:
                connection.close()
            print("dropped", flush=True)
        else:
            controller.order(word)
            print(word, flush=True)


if __name__ == "__main__":
    main()
