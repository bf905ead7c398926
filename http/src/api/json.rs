//! JSON in and out.
//!
//! Called by the bodies and the handlers of [`super`]. Refuses a body that is no object, and says of
//! one that is out of form which field of it is.

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::body::Body;
use crate::error::ApiError;

/// Reads a body.
///
/// # Errors
/// 400, naming the field and what is expected there.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let problem = |error| {
        let message = format!("the request body is not the JSON expected here: {error}");
        ApiError::bad_request(message)
    };
    // serde takes an array of the right length for an object.
    if body.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|byte| *byte != b'{') {
        return Err(problem("it is no object".to_owned()));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        // Text that is not JSON is out of form everywhere, and a missing field nowhere.
        if error.is_data() && path != "." {
            return ApiError::bad_request(format!("`{path}` in the request body: {error}"));
        }
        problem(error.to_string())
    })?;
    deserializer.end().map_err(|error| problem(error.to_string()))?;
    Ok(value)
}

/// Reads a body that may be absent.
///
/// # Errors
/// As [`read`].
pub fn read_or_default<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) { Ok(T::default()) } else { read(body) }
}

/// An answer with a body.
///
/// # Errors
/// 500, when the value does not encode.
pub fn answer(status: StatusCode, value: &impl Serialize) -> Result<Response<Body>, ApiError> {
    Ok(encoded(status, encode(value)?))
}

/// The body of an answer.
///
/// # Errors
/// 500, when the value does not encode.
pub fn encode(value: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(|error| {
        tracing::error!(%error, "an answer does not encode as JSON");
        ApiError::internal()
    })
}

/// An answer whose body is encoded already.
pub fn encoded(status: StatusCode, bytes: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::full(bytes));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use mica_wire::api::{NewSandbox, PauseSandbox, SetTimeout};

    #[test]
    fn the_field_that_is_wrong_is_named() {
        let message = |body: &str| read::<NewSandbox>(body.as_bytes()).unwrap_err().message();
        for (body, field) in [
            (r#"{"templateID":7}"#, "`templateID`"),
            (r#"{"templateID":"a","timeout":"60"}"#, "`timeout`"),
            (r#"{"templateID":"a","metadata":{"b":1}}"#, "`metadata.b`"),
            (r#"{"templateID":"a","envVars":[]}"#, "`envVars`"),
            (r#"{"templateID":"a","autoPause":"yes"}"#, "`autoPause`"),
            (r#"{"templateID":"a","autoResume":{"enabled":1}}"#, "`autoResume`"),
            (r#"{"templateID":"a","lifecycle":{"onTimeout":"sleep"}}"#, "`lifecycle.onTimeout`"),
            ("{}", "`templateID`"),
        ] {
            assert!(message(body).contains(field), "{body}: {}", message(body));
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", " ", "[60]", "60", "null", "\"x\"", "{", "{}}", r#"{"timeout":60} x"#] {
            assert!(read::<SetTimeout>(body.as_bytes()).is_err(), "{body:?}");
        }
        for body in ["[]", "null", "{", "{} x"] {
            assert!(read_or_default::<PauseSandbox>(body.as_bytes()).is_err(), "{body:?}");
        }
        for body in ["", "\r\n", "{}", r#"{"memory":null}"#, r#"{"unknown":[1]}"#] {
            let read = read_or_default::<PauseSandbox>(body.as_bytes());
            assert_eq!(read, Ok(PauseSandbox::default()), "{body:?}");
        }
    }
}
