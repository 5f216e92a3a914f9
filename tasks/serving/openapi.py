"""What a server takes and gives, as an OpenAPI document made from the version that it serves."""

from typing import TYPE_CHECKING, Any

from tidemill.tasks.serving.bodies import ARROW, JSON, PARQUET
from tidemill.tasks.settings import ServeSettings
from tidemill.tasks.training.inputs import Input

if TYPE_CHECKING:
    from tidemill.tasks.serving.predictor import Predictor

_TEXT = {"type": "string"}
_NUMBER = {"type": "number", "format": "float"}


def document(predictor: "Predictor | None", settings: ServeSettings) -> dict[str, Any]:
    """OpenAPI 3.1 of the server.

    Args:
        predictor: The version that is served; None: there is none yet, and of rows nothing is known.
        settings: Of the server.
    """
    row = _row(predictor)
    table = {"type": "string", "format": "binary", "description": "A column for each feature, 1 or more rows."}
    refusals = {
        "400": "The body is not what its content-type says, or x-request-id cannot be one.",
        "401": "The bearer token is missing or wrong.",
        "408": f"The body did not arrive within {settings.max_seconds:g} seconds.",
        "413": f"More than {settings.max_body_bytes:,} bytes or {settings.max_rows:,} rows.",
        "415": "Another content-type, or a compressed body.",
        "422": "A row lacks a column, or holds what the column cannot hold: row and column are named.",
        "503": "There is no version to serve yet, or too many large requests are under way.",
    }
    answer = _answered(200, "A prediction for each row, in order.", "Answer")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tidemill serve" if predictor is None else f"{predictor.version.manifest.model}",
            "version": "none" if predictor is None else str(predictor.version.number),
        },
        "paths": {
            "/predict": {
                "post": {
                    "operationId": "predict",
                    "summary": "Predict for each row.",
                    "parameters": [
                        {
                            "name": "x-request-id",
                            "in": "header",
                            "description": "Names the request in its answer and in the log. Left out, one is made.",
                            "schema": {**_TEXT, "pattern": "^[!-~]{1,128}$"},
                        }
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {
                            JSON: {
                                "schema": {
                                    "oneOf": [
                                        _reference("Row"),
                                        {
                                            "type": "array",
                                            "items": _reference("Row"),
                                            "minItems": 1,
                                            "maxItems": settings.max_rows,
                                        },
                                    ]
                                }
                            },
                            ARROW: {"schema": table},
                            PARQUET: {"schema": table},
                        },
                    },
                    "responses": {
                        "200": answer,
                        **{code: _answered(int(code), words, "Refusal") for code, words in refusals.items()},
                    },
                    "security": [{}, {"bearer": []}],
                }
            },
            "/health": {
                "get": {"summary": "Whether the server answers.", "responses": {"200": {"description": "It does."}}}
            },
            "/ready": {
                "get": {
                    "summary": "Whether there is a version to serve.",
                    "responses": {"200": {"description": "There is."}, "503": {"description": "There is none yet."}},
                }
            },
            "/metrics": {"get": {"summary": "Numbers for Prometheus.", "responses": {"200": {"description": "Text."}}}},
        },
        "components": {
            "schemas": {"Row": row, "Answer": _answer(predictor), "Refusal": _REFUSAL},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _row(predictor: "Predictor | None") -> dict[str, Any]:
    if predictor is None:
        return {"type": "object"}
    columns = predictor.network.features.columns
    return {
        "type": "object",
        "description": "A value for each feature, or null where there is none. What else a row has is not looked at.",
        "properties": {column.name: _nullable(_values(column)) for column in columns},
        "required": [column.name for column in columns],
    }


def _values(column: Input) -> dict[str, Any]:
    """The JSON that a column takes."""
    if column.width is not None:
        items = {"type": ["number", "null"]}
        return {"type": "array", "items": items, "minItems": column.width, "maxItems": column.width}
    match column.family:
        case "text":
            return {"type": "string"}
        case "time":
            return {
                "type": "string",
                "description": "A date, or a date and a time, as ISO 8601; without a time zone it is UTC.",
            }
        case "duration":
            return {"type": ["number", "string"], "description": "Seconds, or a time of day as ISO 8601."}
        case "list of text":
            return {"type": "array", "items": {"type": ["string", "null"]}}
        case "list of integers":
            return {"type": "array", "items": {"type": ["integer", "null"]}}
    return {"type": ["number", "boolean"]}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = schema["type"]
    return schema | {"type": [*([kinds] if isinstance(kinds, str) else kinds), "null"]}


def _answer(predictor: "Predictor | None") -> dict[str, Any]:
    prediction: dict[str, Any] = {}
    properties: dict[str, Any] = {
        "version": {"type": "integer", "description": "The version that predicted all rows."},
        "request": {**_TEXT, "description": "The id of the request."},
    }
    more: list[str] = []
    if predictor is not None:
        spec, labels = predictor.spec, predictor.labels
        several = {"type": "array", "items": _NUMBER}
        if labels is not None:
            prediction = {"enum": list(labels)}
            properties["labels"] = {"type": "array", "items": prediction, "description": "What probabilities are of."}
            properties["probabilities"] = {"type": "array", "items": several}
            more = ["labels", "probabilities"]
        else:
            prediction = several if spec.task == "multiclass" or len(spec.targets) > 1 else _NUMBER
    properties["predictions"] = {"type": "array", "items": prediction, "description": "One for each row, in order."}
    return {"type": "object", "properties": properties, "required": ["version", "request", "predictions", *more]}


_REFUSAL = {
    "type": "object",
    "properties": {
        "detail": {**_TEXT, "description": "What is wrong."},
        "row": {"type": "integer", "description": "The row at fault, from 0."},
        "column": {**_TEXT, "description": "The column at fault."},
    },
    "required": ["detail"],
}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answered(code: int, words: str, schema: str) -> dict[str, Any]:
    headers = {"x-request-id": {"schema": _TEXT}}
    if code == 200:
        headers["x-tidemill-version"] = {"schema": {"type": "string", "description": "As `version`."}}
    return {"description": words, "headers": headers, "content": {JSON: {"schema": _reference(schema)}}}
