//! `GET /openapi.json`: the control plane, described from the types that it reads and writes.
//!
//! Called by [`crate::api`]. What is served is the table in `operations`, which a test holds against
//! the router's. Refuses to describe the sandbox's own ports: what they serve is the guest's.

mod operations;

use std::sync::OnceLock;

use hyper::Response;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use mica_wire::api::ErrorBody;
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::body::Body;
use operations::{Answer, Kind, OPERATIONS, Operation, Parameter};

/// What every operation may be answered with instead, and why.
const ERRORS: [(u16, &str); 16] = [
    (400, "The request is out of form; the message says what to change."),
    (401, "No API key, or none that is valid here."),
    (403, "The operator's, or not for this key."),
    (404, "There is no such thing, or it is not yours."),
    (405, "The path is there, the method is not."),
    (408, "The body did not arrive in time."),
    (409, "Something else has it, or it is not in a state for that."),
    (411, "The body has no length."),
    (413, "The body is too long."),
    (422, "The same idempotency key came with another request before."),
    (429, "Too many requests, or as many sandboxes as this key may have."),
    (500, "The host, or a guest, failed."),
    (501, "This host does not offer it."),
    (503, "The host is too busy, or a guest does not answer; with `Retry-After`, for a moment."),
    (504, "A guest did not come up in time."),
    (507, "The host's disk is full."),
];

/// Those of every operation that takes a key.
const COMMON_ERRORS: [u16; 7] = [400, 401, 408, 413, 429, 500, 503];

/// Answers.
pub fn answer() -> Response<Body> {
    static TEXT: OnceLock<Vec<u8>> = OnceLock::new();
    let text = TEXT.get_or_init(|| document().to_string().into_bytes());
    let mut response = Response::new(Body::full(text.as_slice()));
    let json = HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for operation in &OPERATIONS {
        let described = describe(operation, &mut generator);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.to_lowercase()] = described;
    }
    let error = generator.subschema_for::<ErrorBody>();
    let response = |(status, about): &(u16, &str)| {
        let content = json!({ "application/json": { "schema": error.clone() } });
        (format!("Error{status}"), json!({ "description": about, "content": content }))
    };
    let responses: Map<String, Value> = ERRORS.iter().map(response).collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Mica",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The control plane of a sandbox host, as the clients of E2B and of \
                            CubeSandbox call it.",
        },
        "security": [{ "ApiKey": [] }],
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "responses": responses,
            "securitySchemes": {
                "ApiKey": { "type": "apiKey", "in": "header", "name": "X-API-Key" },
            },
        },
    })
}

fn describe(operation: &Operation, generator: &mut SchemaGenerator) -> Value {
    let Operation { method, path, summary, .. } = operation;
    let id = format!("{method}{path}").to_lowercase();
    let id: String = id.chars().filter(|c| !matches!(c, '{' | '}')).collect();
    let in_path = path.split('/').filter_map(|segment| segment.strip_prefix('{'));
    let in_path = in_path.map(|name| {
        let name = name.trim_end_matches('}');
        let schema = json!({ "type": "string", "minLength": 1 });
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    });
    let parameters: Vec<Value> =
        in_path.chain(operation.query.iter().map(query_parameter)).collect();
    let mut described = json!({
        "operationId": id.replace(['/', '.', '-'], "_"),
        "summary": summary,
        "tags": [operation.tag],
        "parameters": parameters,
        "responses": responses(operation, generator),
    });
    if let Some(body) = &operation.body {
        let schema = (body.schema)(generator);
        described["requestBody"] = json!({
            "required": body.required,
            "content": { "application/json": { "schema": schema } },
        });
    }
    if operation.is_open {
        described["security"] = json!([]);
    }
    described
}

fn query_parameter(parameter: &Parameter) -> Value {
    let schema = match parameter.kind {
        Kind::Text => json!({ "type": "string" }),
        Kind::Integer(low, high) => json!({ "type": "integer", "minimum": low, "maximum": high }),
        Kind::OneOf(values) => json!({ "type": "string", "enum": values }),
    };
    json!({
        "name": parameter.name,
        "in": "query",
        "required": parameter.required,
        "description": parameter.about,
        "schema": schema,
    })
}

fn responses(operation: &Operation, generator: &mut SchemaGenerator) -> Value {
    let mut responses = Map::new();
    let common: &[u16] = if operation.is_open { &[400, 408, 413, 503] } else { &COMMON_ERRORS };
    for status in common.iter().chain(operation.errors) {
        let reference = format!("#/components/responses/Error{status}");
        responses.insert(status.to_string(), json!({ "$ref": reference }));
    }
    for (status, answer) in operation.answers.iter().flatten() {
        let mut response = json!({ "description": operation.summary });
        match answer {
            Answer::Nothing => {}
            Answer::Text => {
                response["content"] = json!({ "text/plain": { "schema": {
                "type": "string",
            } } })
            }
            Answer::File(kind) => {
                let schema = json!({ "type": "string", "format": "binary" });
                response["content"] = json!({ *kind: { "schema": schema } });
            }
            Answer::Json(schema) => {
                let schema = schema(generator);
                response["content"] = json!({ "application/json": { "schema": schema } });
            }
        }
        if operation.has_pages {
            response["headers"] = json!({ "x-next-token": {
                "description": "What `nextToken` of the next page is. Absent on the last.",
                "required": false,
                "schema": { "type": "string" },
            } });
        }
        responses.insert(status.to_string(), response);
    }
    Value::Object(responses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use crate::route::ENDPOINTS;

    #[test]
    fn every_endpoint_is_described_and_nothing_else_is() {
        let served: BTreeSet<_> =
            ENDPOINTS.iter().map(|endpoint| (endpoint.method.as_str(), endpoint.path)).collect();
        let described: BTreeSet<_> =
            OPERATIONS.iter().map(|operation| (operation.method, operation.path)).collect();
        let missing: Vec<_> = served.difference(&described).collect();
        let invented: Vec<_> = described.difference(&served).collect();
        assert!(missing.is_empty(), "in the router and not described: {missing:?}");
        assert!(invented.is_empty(), "described and not in the router: {invented:?}");
        assert_eq!(described.len(), OPERATIONS.len(), "each once");
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_name_is_its_own() {
        let document = document();
        let mut open = vec![&document];
        let mut references = 0;
        while let Some(value) = open.pop() {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(reference)) = map.get("$ref") {
                        let pointer = reference.strip_prefix('#').unwrap();
                        assert!(document.pointer(pointer).is_some(), "{reference}");
                        references += 1;
                    }
                    open.extend(map.values());
                }
                Value::Array(list) => open.extend(list),
                _ => {}
            }
        }
        assert!(references > 100, "{references}");
        let ids: BTreeSet<_> = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|path| path.as_object().unwrap().values())
            .map(|operation| operation["operationId"].as_str().unwrap())
            .collect();
        assert_eq!(ids.len(), OPERATIONS.len());
    }

    /// Of this document alone nothing but that it is an object is said.
    #[test]
    fn every_answer_names_its_fields() {
        let document = document();
        let mut named = 0;
        for (path, operations) in document["paths"].as_object().unwrap() {
            let responses = operations.as_object().unwrap().values();
            let responses =
                responses.flat_map(|operation| operation["responses"].as_object().unwrap());
            for (status, answer) in responses {
                let schema = &answer["content"]["application/json"]["schema"];
                let entry = if schema["type"] == "array" { &schema["items"] } else { schema };
                let is_named = entry["$ref"].is_string();
                named += usize::from(is_named);
                assert!(
                    schema.is_null() || is_named || path == "/openapi.json",
                    "{path} {status}: {schema}"
                );
            }
        }
        assert!(named > 30, "{named}");
    }

    #[test]
    fn what_clients_demand_is_required() {
        let document = document();
        let required = |name: &str| {
            let list = document["components"]["schemas"][name]["required"].as_array().unwrap();
            list.iter().map(|field| field.as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
        };
        for field in ["templateID", "sandboxID", "clientID", "envdVersion"] {
            assert!(required("Sandbox").contains(field), "{field}");
        }
        assert_eq!(required("NewSandbox"), BTreeSet::from(["templateID".to_owned()]));
        for field in ["cpuCount", "memoryMB", "diskSizeMB", "state", "startedAt"] {
            assert!(required("SandboxDetail").contains(field), "{field}");
        }
        for field in ["templateID", "buildID", "public", "names", "tags", "aliases"] {
            assert!(required("TemplateRequestResponseV3").contains(field), "{field}");
        }
        let always = ["logs", "logEntries", "templateID", "buildID", "status"];
        assert_eq!(required("TemplateBuildInfo"), always.map(str::to_owned).into());
    }
}
