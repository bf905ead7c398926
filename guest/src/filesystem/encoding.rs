//! Content codings: what a client accepts, and undoing what it sent.
//!
//! Called by [`super::files`]. Pure. Refuses codings other than `gzip` and `identity`, and a gzip
//! stream that is broken or ends early.

use std::io::Write as _;

use bytes::Bytes;
use flate2::write::MultiGzDecoder;

/// A coding we can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Identity,
    Gzip,
}

/// The coding for an answer: the one the client likes best, the first of equals. `None` when it
/// accepts neither.
pub fn accepted(header: &str) -> Option<Encoding> {
    // Where each stands in the list, and how it is liked.
    let (mut gzip, mut identity, mut rest) = (None, None, None);
    for (place, item) in header.split(',').enumerate() {
        let mut fields = item.split(';').map(str::trim);
        let name = fields.next().unwrap_or("").to_ascii_lowercase();
        let quality = fields
            .find_map(|field| field.strip_prefix("q=").or_else(|| field.strip_prefix("Q=")))
            .map_or(1.0, |text| text.parse::<f32>().unwrap_or(0.0));
        let which = match name.as_str() {
            "gzip" | "x-gzip" => &mut gzip,
            "identity" => &mut identity,
            "*" => &mut rest,
            _ => continue,
        };
        *which = which.or(Some((place, quality)));
    }
    let is_refused = |(_, quality): (usize, f32)| quality <= 0.0;
    // Whoever takes anything is given what costs neither side, unless that is refused by its name.
    if identity.is_some_and(is_refused) {
        gzip = gzip.or(rest);
    }
    let identity = identity.or(rest);
    match (gzip.filter(|gzip| !is_refused(*gzip)), identity) {
        (Some(_), None) => Some(Encoding::Gzip),
        (Some((place, quality)), Some((other_place, other_quality))) => {
            let is_first =
                quality > other_quality || (quality >= other_quality && place < other_place);
            Some(if is_first { Encoding::Gzip } else { Encoding::Identity })
        }
        // What is not coded need not be asked for.
        (None, identity) => Some(Encoding::Identity).filter(|_| !identity.is_some_and(is_refused)),
    }
}

/// Whether what is not coded will do, however the client likes it.
pub fn takes_identity(header: &str) -> bool {
    // Whoever is not offered gzip says what it thinks of the rest.
    let without_gzip: Vec<&str> =
        header.split(',').filter(|item| !item.to_ascii_lowercase().contains("gzip")).collect();
    accepted(&without_gzip.join(",")) == Some(Encoding::Identity)
}

/// Undoes gzip piece by piece. The output of one piece is bounded by gzip's ratio of about 1000
/// times [`PIECE_BYTES`].
#[derive(Debug)]
pub struct Gunzip(MultiGzDecoder<Vec<u8>>);

/// How much is put in at once.
const PIECE_BYTES: usize = 4096;

impl Gunzip {
    pub fn new() -> Self {
        Self(MultiGzDecoder::new(Vec::new()))
    }

    /// Takes up to [`PIECE_BYTES`] off `input` and gives what comes out of them.
    ///
    /// # Errors
    /// When it is not gzip.
    pub fn decode(&mut self, input: &mut Bytes) -> std::io::Result<Bytes> {
        let piece = input.split_to(input.len().min(PIECE_BYTES));
        self.0.write_all(&piece)?;
        Ok(Bytes::from(std::mem::take(self.0.get_mut())))
    }

    /// The rest, at the end of the input.
    ///
    /// # Errors
    /// When the stream is not complete.
    pub fn finish(&mut self) -> std::io::Result<Bytes> {
        self.0.try_finish()?;
        Ok(Bytes::from(std::mem::take(self.0.get_mut())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn gunzip(data: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut input = Bytes::copy_from_slice(data);
        let mut gunzip = Gunzip::new();
        let mut out = Vec::new();
        while !input.is_empty() {
            let piece = gunzip.decode(&mut input)?;
            assert!(piece.len() <= PIECE_BYTES * 1100, "one piece gave {}", piece.len());
            out.extend(piece);
        }
        out.extend(gunzip.finish()?);
        Ok(out)
    }

    #[test]
    fn the_client_chooses() {
        for (header, wanted) in [
            ("gzip", Some(Encoding::Gzip)),
            ("gzip, deflate, br", Some(Encoding::Gzip)),
            ("identity, gzip", Some(Encoding::Identity)),
            ("identity;q=0.5, gzip;q=0.9", Some(Encoding::Gzip)),
            ("gzip;q=0", Some(Encoding::Identity)),
            ("br", Some(Encoding::Identity)),
            ("", Some(Encoding::Identity)),
            ("*", Some(Encoding::Identity)),
            ("br, identity;q=0", None),
            ("br, *;q=0", None),
            ("gzip, *;q=0", Some(Encoding::Gzip)),
            ("*, identity;q=0", Some(Encoding::Gzip)),
            ("gzip;q=0.1, *;q=0.5", Some(Encoding::Identity)),
            ("GZIP;q=1.0, identity;q=0", Some(Encoding::Gzip)),
            ("gzip;q=0, *;q=0.5, identity;q=0", None),
        ] {
            assert_eq!(accepted(header), wanted, "{header}");
        }
    }

    #[test]
    fn gzip_is_undone_and_a_bomb_comes_in_pieces() {
        assert_eq!(gunzip(&gzip(b"hello")).unwrap(), b"hello");
        assert_eq!(gunzip(&gzip(b"")).unwrap(), b"");
        let zeros = vec![0; 50_000_000];
        assert_eq!(gunzip(&gzip(&zeros)).unwrap().len(), zeros.len());
    }

    #[test]
    fn what_is_not_whole_gzip_is_refused() {
        let whole = gzip(b"hello, hello, hello");
        assert!(gunzip(b"plain text, not gzip").is_err());
        for end in 1..whole.len() {
            assert!(gunzip(&whole[..end]).is_err(), "cut at {end}");
        }
        let mut changed = whole.clone();
        let at = changed.len() - 6;
        changed[at] ^= 1;
        assert!(gunzip(&changed).is_err(), "the checksum is looked at");
    }
}
