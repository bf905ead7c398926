//! The Connect protocol, as E2B's SDKs speak it: unary calls and server streams.
//!
//! Called by the services that register RPCs on the router. Refuses messages over
//! [`MESSAGE_BYTES_MAX`], content types of no known codec, and a stream that outlives its
//! `Connect-Timeout-Ms`.
//!
//! ```text
//!  unary   POST /package.Service/Method   application/json          one message each way
//!  stream  POST /package.Service/Method   application/connect+json  envelopes each way:
//!          ┌ flags u8 ┬ length u32 BE ┬ message ┐ ...  and one last envelope with flags 2
//! ```

pub mod codec;
pub mod envelope;
pub mod error;
pub mod json;
pub mod rpc;
pub mod stream;

pub use codec::{Codec, Json, Message};
pub use error::{Code, ConnectError};
pub use rpc::{Context, server_stream, unary};
pub use stream::StreamSender;

/// Longest message of a request, and so of one envelope. Input to a process comes in messages of
/// this size at most; SDKs send far smaller ones.
pub const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
