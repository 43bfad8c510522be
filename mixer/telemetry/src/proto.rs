//! Generated code of `istio.mixer.v1`, and what it needs of `google.rpc`.

/// `google.rpc`.
pub mod google_rpc {
    /// `google.rpc.Status`.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Status {
        /// `google.rpc.Code`; 0 is OK.
        #[prost(int32, tag = "1")]
        pub code: i32,
        /// For people.
        #[prost(string, tag = "2")]
        pub message: String,
        /// For programs.
        #[prost(message, repeated, tag = "3")]
        pub details: Vec<prost_types::Any>,
    }
}

/// `istio.mixer.v1`.
#[allow(unreachable_pub, clippy::all, missing_docs)]
pub mod mixer_v1 {
    tonic::include_proto!("istio.mixer.v1");
}
