//! Federation: membership, registry exchange, leases.

pub mod exchange;
pub mod token;
pub mod wire;

mod generated {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    pub mod federation {
        pub mod v1 {
            tonic::include_proto!("flotilla.federation.v1");
        }
        pub mod admin {
            pub mod v1 {
                tonic::include_proto!("flotilla.federation.admin.v1");
            }
        }
    }
    pub mod citadel {
        pub mod v1 {
            tonic::include_proto!("flotilla.citadel.v1");
        }
    }
}

/// `flotilla.citadel.v1`, generated: the CA that this component and the CLI ask.
pub use generated::citadel::v1 as authority_pb;
/// `flotilla.federation.admin.v1`, generated.
pub use generated::federation::admin::v1 as admin_pb;
/// `flotilla.federation.v1`, generated.
pub use generated::federation::v1 as pb;
