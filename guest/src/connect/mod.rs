//! The Connect protocol, as E2B's SDKs speak it: unary calls, server streams, client streams.
//!
//! Called by the services that register RPCs on the router. Refuses messages over
//! [`MESSAGE_BYTES_MAX`], content types of no known codec, compression, and a stream that outlives
//! its `Connect-Timeout-Ms`.
//!
//! ```text
//!  unary   POST /package.Service/Method   application/json          one message each way
//!                                         application/proto
//!  stream  POST /package.Service/Method   application/connect+json  envelopes each way:
//!                                         application/connect+proto
//!          ┌ flags u8 ┬ length u32 BE ┬ message ┐ ...  and one last envelope with flags 2
//! ```
//! The error of a unary call and the last envelope of a stream are JSON whatever the codec.

pub mod codec;
pub mod envelope;
pub mod error;
pub mod incoming;
pub mod json;
pub mod rpc;
pub mod stream;

pub use codec::{Codec, Nothing, Reply, Request};
pub use error::{Code, ConnectError};
pub use incoming::Incoming;
pub use rpc::{Context, client_stream, server_stream, unary};
pub use stream::StreamSender;

/// Longest message of a request, and so of one envelope. Input to a process comes in messages of
/// this size at most; SDKs send far smaller ones.
pub const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
