//! The header that manifests have in common: magic, version, length and checksum around a body.
//!
//! Called by `manifest`, `snapshot` and `working_set`. Refuses bytes that are not exactly one sealed
//! body, before anything looks into it.
//!
//! ```text
//!  0        8         12       16       20
//!  ┌────────┬─────────┬────────┬────────┬──────────────┐
//!  │ magic  │ version │ length │ CRC32C │ body         │   integers little endian; length is that
//!  └────────┴─────────┴────────┴────────┴──────────────┘   of the body; the CRC covers all else
//! ```

use crate::manifest::ManifestError;

/// Bytes before the body.
pub(crate) const HEADER_BYTES: usize = 20;
const AT_CRC: usize = 16;

/// One kind of sealed file.
pub(crate) struct Envelope {
    pub(crate) magic: &'static [u8; 8],
    pub(crate) version: u32,
    /// The longest file that is written or read.
    pub(crate) bytes_max: usize,
}

const _: () = assert!(HEADER_BYTES == 8 + 4 + 4 + 4);

impl Envelope {
    /// The bytes to store for a body.
    pub(crate) fn seal(&self, body: &[u8]) -> Result<Vec<u8>, ManifestError> {
        let length = u32::try_from(body.len())
            .ok()
            .filter(|_| HEADER_BYTES + body.len() <= self.bytes_max)
            .ok_or(ManifestError::Length { got: body.len(), expected: self.bytes_max })?;
        let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
        out.extend_from_slice(self.magic);
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&length.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out), body);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(body);
        Ok(out)
    }

    /// The body, once the header and the checksum have been found right.
    pub(crate) fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], ManifestError> {
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(ManifestError::Length { got: bytes.len(), expected: HEADER_BYTES });
        };
        if &header[..8] != self.magic {
            return Err(ManifestError::Magic);
        }
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if word(8) != self.version {
            return Err(ManifestError::Version(word(8)));
        }
        let expected = usize::try_from(word(12)).unwrap_or(usize::MAX).saturating_add(HEADER_BYTES);
        if bytes.len() != expected || expected > self.bytes_max {
            return Err(ManifestError::Length { got: bytes.len(), expected });
        }
        if crc32c::crc32c_append(crc32c::crc32c(&header[..AT_CRC]), body) != word(AT_CRC) {
            return Err(ManifestError::Checksum);
        }
        Ok(body)
    }
}
