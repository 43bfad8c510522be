//! What end-to-end tests put into a mesh: an echo workload that speaks every protocol of the test
//! matrix, says who it is and what it saw, and calls others when told to.
//!
//! - [`echo`]: the servers.
//! - [`call`]: the clients.
//! - [`control`]: a private unix socket by which a test tells a workload to call, so that the calls
//!   come from the workload's network namespace.

pub mod call;
pub mod control;
pub mod echo;
pub mod paced;
pub mod websocket;

/// Ports of the echo workload.
pub mod ports {
    /// HTTP/1.1 and WebSocket.
    pub const HTTP: u16 = 8080;
    /// HTTP/2 in clear, prior knowledge.
    pub const HTTP2: u16 = 8081;
    /// gRPC.
    pub const GRPC: u16 = 8082;
    /// TCP, the client speaks first.
    pub const TCP: u16 = 9000;
    /// TCP, the server speaks first.
    pub const TCP_FIRST: u16 = 9001;
}

/// The method that the gRPC server answers.
pub const GRPC_PATH: &str = "/flotilla.test.Echo/Call";
