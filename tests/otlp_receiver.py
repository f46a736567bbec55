"""A receiver of OTLP, on a real gRPC and a real HTTP endpoint, that keeps what it is sent."""

from __future__ import annotations

import gzip
import threading
import time
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import LogsServiceServicer, add_LogsServiceServicer_to_server
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class Span:
    """A span as it was received; times in seconds."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    begun: float
    ended: float
    attributes: dict[str, Any]
    failed: bool
    events: tuple[str, ...]
    resource: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A log record as it was received."""

    body: str
    severity: str
    trace_id: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


@dataclass
class Receiver:
    """Both endpoints. `silent` accepts and never answers; `refusing` answers 503 or UNAVAILABLE."""

    spans: list[Span] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    silent: bool = False
    refusing: bool = False

    def start(self) -> Receiver:
        self._released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._grpc = grpc.server(futures.ThreadPoolExecutor(4))
        add_TraceServiceServicer_to_server(_Traces(self), self._grpc)
        add_LogsServiceServicer_to_server(_Logs(self), self._grpc)
        self.grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        return self

    @property
    def http_port(self) -> int:
        return int(self._http.server_address[1])

    def close(self) -> None:
        self._released.set()
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(0).wait(5)

    def hold(self) -> None:
        """Keeps a client waiting while `silent`."""
        while self.silent and not self._released.is_set():
            time.sleep(0.05)

    def take_traces(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            where = _attributes(group.resource.attributes)
            for scope in group.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Span(
                            service=where["service.name"],
                            name=span.name,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            kind=span.kind,
                            begun=span.start_time_unix_nano / 1e9,
                            ended=span.end_time_unix_nano / 1e9,
                            attributes=_attributes(span.attributes),
                            failed=span.status.code == span.status.STATUS_CODE_ERROR,
                            events=tuple(event.name for event in span.events),
                            resource=where,
                        )
                    )

    def take_logs(self, request: ExportLogsServiceRequest) -> None:
        for group in request.resource_logs:
            where = _attributes(group.resource.attributes)
            for scope in group.scope_logs:
                for record in scope.log_records:
                    self.records.append(
                        Record(
                            body=record.body.string_value,
                            severity=record.severity_text,
                            trace_id=record.trace_id.hex(),
                            attributes=_attributes(record.attributes),
                            resource=where,
                        )
                    )


class _Traces(TraceServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
        self._receiver.take_traces(request)
        return ExportTraceServiceResponse()


class _Logs(LogsServiceServicer):
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> ExportLogsServiceResponse:
        self._receiver.take_logs(request)
        return ExportLogsServiceResponse()


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.hold()
            if receiver.refusing:
                self.send_error(503)
                return
            if self.path == "/v1/traces":
                receiver.take_traces(ExportTraceServiceRequest.FromString(body))
            elif self.path == "/v1/logs":
                receiver.take_logs(ExportLogsServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing: the test looks at what was received."""

    return Handler
