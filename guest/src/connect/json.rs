//! proto3 JSON's own ideas of numbers, bytes and `null`, for `#[serde(with = ...)]`.
//!
//! Called by the message types of the services. `null` is every field's default; a member of a oneof that is
//! `null` is not there. Refuses text that is not the number or the base64 it should be.

/// A number, or its text.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Either<T> {
    Number(T),
    Text(String),
}

/// Reads a number in either form; `None` for `null`.
fn number<'de, D, T>(from: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::Deserialize<'de> + std::str::FromStr,
{
    use serde::Deserialize as _;
    let wrong = || serde::de::Error::custom("this is no number that the field can hold");
    match Option::<Either<T>>::deserialize(from).map_err(|_| wrong())? {
        None => Ok(None),
        Some(Either::Number(number)) => Ok(Some(number)),
        Some(Either::Text(text)) => text.parse().map(Some).map_err(|_| wrong()),
    }
}

/// A 64-bit integer: written as a string, read from a string or a number.
pub mod int64 {
    use serde::{Deserializer, Serializer};

    /// Writes it as a string.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn serialize<S: Serializer>(value: &i64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    /// Reads it from either form.
    ///
    /// # Errors
    /// When it is neither.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
        super::number(from).map(Option::unwrap_or_default)
    }
}

/// A 32-bit unsigned integer that may come as a string as well.
pub mod uint32 {
    use serde::{Deserializer, Serializer};

    /// Writes it as a number.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn serialize<S: Serializer>(value: &u32, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(*value)
    }

    /// Reads it from either form.
    ///
    /// # Errors
    /// When it is neither, or too large.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
        super::number(from).map(Option::unwrap_or_default)
    }

    /// The same for a member of a oneof.
    ///
    /// # Errors
    /// As [`deserialize`].
    pub fn optional<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
        super::number(from)
    }
}

/// Bytes, as base64: standard on the way out, standard or URL-safe, padded or not, on the way in.
pub mod base64 {
    use base64::Engine as _;
    use base64::engine::DecodePaddingMode;
    use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes base64.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn serialize<S: Serializer>(value: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(value))
    }

    /// Reads base64.
    ///
    /// # Errors
    /// When it is not base64.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        optional(from).map(Option::unwrap_or_default)
    }

    /// The same for a member of a oneof.
    ///
    /// # Errors
    /// As [`deserialize`].
    pub fn optional<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<u8>>, D::Error> {
        const LENIENT: GeneralPurpose = GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
        );
        let Some(text) = Option::<String>::deserialize(from)? else { return Ok(None) };
        let text = text.replace('-', "+").replace('_', "/");
        LENIENT.decode(text).map(Some).map_err(serde::de::Error::custom)
    }
}

/// Reads `null` as the field's default, as proto3 JSON has it.
///
/// # Errors
/// The deserialiser's.
pub fn or_default<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + serde::Deserialize<'de>,
{
    Ok(<Option<T> as serde::Deserialize>::deserialize(from)?.unwrap_or_default())
}

/// An enum of the protocol.
pub trait Named: Copy + Into<i32> + TryFrom<i32> + 'static {
    /// Every value, and its name in JSON.
    const NAMES: &'static [(Self, &'static str)];
}

/// A field that holds such an enum as `prost` has it, as a number: its name on the way out, its
/// name or number on the way in.
#[derive(Debug)]
pub struct Names<T>(std::marker::PhantomData<T>);

impl<T: Named> Names<T> {
    /// Writes the name, or the number of a value that has none.
    ///
    /// # Errors
    /// The serialiser's.
    pub fn serialize<S: serde::Serializer>(value: &i32, to: S) -> Result<S::Ok, S::Error> {
        let found = T::NAMES.iter().find(|(named, _)| (*named).into() == *value);
        match found {
            Some((_, name)) => to.serialize_str(name),
            None => to.serialize_i32(*value),
        }
    }

    /// Reads it from either form.
    ///
    /// # Errors
    /// When there is no such name.
    pub fn deserialize<'de, D: serde::Deserializer<'de>>(from: D) -> Result<i32, D::Error> {
        let given: Option<Either<i32>> = serde::Deserialize::deserialize(from)?;
        let Some(given) = given else { return Ok(0) };
        match given {
            Either::Number(number) => Ok(number),
            Either::Text(text) => T::NAMES
                .iter()
                .find(|(_, name)| *name == text)
                .map(|(named, _)| (*named).into())
                .ok_or_else(|| serde::de::Error::custom(format!("there is no `{text}`"))),
        }
    }
}

#[cfg(test)]
mod tests {
    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    struct All {
        #[serde(with = "super::int64")]
        size: i64,
        #[serde(with = "super::uint32")]
        pid: u32,
        #[serde(with = "super::base64")]
        data: Vec<u8>,
    }

    #[test]
    fn both_forms_are_read_and_one_is_written() {
        let all = All { size: -5, pid: 7, data: b"hi>".to_vec() };
        let written = r#"{"size":"-5","pid":7,"data":"aGk+"}"#;
        assert_eq!(serde_json::to_string(&all).unwrap(), written);
        for text in [written, r#"{"size":-5,"pid":"7","data":"aGk-"}"#] {
            assert_eq!(serde_json::from_str::<All>(text).unwrap(), all);
        }
        let nothing = All { size: 0, pid: 0, data: Vec::new() };
        let null = r#"{"size":null,"pid":null,"data":null}"#;
        assert_eq!(serde_json::from_str::<All>(null).unwrap(), nothing);
        assert!(serde_json::from_str::<All>(r#"{"size":"x","pid":7,"data":""}"#).is_err());
        assert!(serde_json::from_str::<All>(r#"{"size":1,"pid":-7,"data":""}"#).is_err());
        assert!(serde_json::from_str::<All>(r#"{"size":1,"pid":7,"data":"!"}"#).is_err());
    }
}
