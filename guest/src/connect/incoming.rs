//! The messages of a client stream, one by one as they come.
//!
//! Made by `rpc`, read by handlers. Refuses what [`Decoder`] refuses and a body that ends inside a
//! message; holds one message, so that a client that is faster than the handler waits.

use std::marker::PhantomData;

use hyper::body::Incoming as Body;

use super::envelope::{Decoder, Envelope};
use super::{Code, Codec, ConnectError, Request};
use crate::http::body::RequestBody;

/// A client's stream of messages.
#[derive(Debug)]
pub struct Incoming<T> {
    body: RequestBody,
    codec: Codec,
    envelopes: Decoder,
    message: PhantomData<fn() -> T>,
}

impl<T: Request> Incoming<T> {
    pub(super) fn new(body: Body, codec: Codec) -> Self {
        Self {
            body: RequestBody::new(body),
            codec,
            envelopes: Decoder::default(),
            message: PhantomData,
        }
    }

    /// The next message, as soon as it is there; `None` at the end.
    ///
    /// # Errors
    /// When the body is not a sequence of messages of this type, or breaks off.
    pub async fn next(&mut self) -> Result<Option<T>, ConnectError> {
        loop {
            match self.envelopes.take()? {
                Some(Envelope::Message(bytes)) => return self.codec.decode(&bytes).map(Some),
                Some(Envelope::End) => return Ok(None),
                None => {}
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.envelopes.push(&data);
                    }
                }
                Some(Err(error)) => {
                    let text = format!("the stream broke off: {error}");
                    return Err(ConnectError::new(Code::Canceled, text));
                }
                None => {
                    self.envelopes.finish()?;
                    return Ok(None);
                }
            }
        }
    }
}
