//! What becomes of a request under a configuration, without a network.
//!
//! Documents are read by galley, pilot generates what the caller's proxy and the proxies at the other end would get, and
//! the engine's own code is asked what it does with it (`mesh_proxy::simulate`). Nothing here knows a rule of routing or
//! policy of its own, so an answer is what the mesh does.
//!
//! Entry points: [`Mesh::load`] and [`Mesh::ask`].

mod answer;
mod assume;
mod authz;
mod question;
mod walk;

use std::{io, path::PathBuf};

use mesh_model::{ClusterId, NetworkId, TrustDomain, federation::Transport};
use mesh_proxy::simulate::Unusable;
use pilot::{
    config::{Problem, Reader},
    simulate::ConfigState,
    world::{Settings, World},
};

pub use self::{
    answer::{
        Answer, Asked, Caller, Direct, Endpoint, Fault, Mirror, Policy, Reason, Retries, Share,
        TrafficPolicy, Weight,
    },
    authz::{Decision, Missed, RequestError, RequestFile},
    question::{Question, QuestionError},
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The question itself.
    #[error(transparent)]
    Question(#[from] QuestionError),
    /// Generated configuration that a proxy would refuse.
    #[error("the proxy would refuse its configuration: {0}")]
    Unusable(#[from] Unusable),
    /// A name that is not one.
    #[error("{0}")]
    Name(String),
}

/// What is not in documents.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cluster.
    pub cluster: String,
    /// Its trust domain, unless a `MeshConfig` document names one.
    pub trust_domain: String,
    /// Fill in what documents leave open: proxies of workloads, and workloads of services that have none.
    pub assume: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { cluster: "local".to_owned(), trust_domain: TrustDomain::default().to_string(), assume: true }
    }
}

/// A mesh that exists on paper.
#[derive(Debug)]
pub struct Mesh {
    world: World,
    validation: galley::Validation,
}

impl Mesh {
    /// Reads documents from files and directories; the path `-` is `stdin`.
    ///
    /// # Errors
    /// If cluster or trust domain are not valid names.
    pub fn load(paths: &[PathBuf], stdin: &mut dyn io::Read, options: &Options) -> Result<Self, Error> {
        let name = |e: &dyn std::fmt::Display| Error::Name(e.to_string());
        let settings = Settings {
            cluster: ClusterId::new(&options.cluster).map_err(|e| name(&e))?,
            network: NetworkId::new(&options.cluster).map_err(|e| name(&e))?,
            trust_domain: TrustDomain::new(&options.trust_domain).map_err(|e| name(&e))?,
            east_west: vec![],
            reachable: true,
            federation_address: None,
            transport: Transport::Tcp,
        };
        let mut loaded = galley::load_files(paths, stdin);
        if options.assume {
            assume::assume(&mut loaded.documents, &loaded.templates);
        }
        let config = Reader::default().read(&loaded.documents, &ConfigState::default());
        Ok(Self { world: World::new(settings, config), validation: loaded.validation })
    }

    /// Verdicts on the documents; what is invalid there is no part of the mesh.
    #[must_use]
    pub fn validation(&self) -> &galley::Validation {
        &self.validation
    }

    /// What pilot could not use.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.world.problems
    }

    /// Whether policies let a request in.
    ///
    /// # Errors
    /// If the request contradicts itself, or a policy does not compile.
    pub fn authorize(&self, request: &RequestFile) -> Result<Decision, RequestError> {
        authz::decide(&self.world, request)
    }

    /// `status` of the Gateway API's documents, as pilot shows it (`/debug/gatewayz`) while no gateway is connected.
    #[must_use]
    pub fn gateway_api_status(&self) -> pilot::gateway_api::status::Status {
        pilot::gateway_api::status::status(&self.world.config, &[])
    }

    /// `status` of the Ingresses that the mesh serves, as pilot shows it (`/debug/ingressz`) while no gateway is connected.
    #[must_use]
    pub fn ingress_status(&self) -> Vec<pilot::ingress::status::Object> {
        pilot::ingress::status::status(&self.world.config, &[])
    }

    /// The configuration of a caller's proxy, as the engine executes it: `listeners`, `routes`, `clusters` and
    /// `endpoints` by name, virtual hosts of a route configuration by name as well; `filters` repeats the HTTP filters
    /// of each filter chain by kind.
    ///
    /// # Errors
    /// If `from` is not `namespace/workload`.
    pub fn configuration(&self, from: &str) -> Result<serde_json::Value, Error> {
        walk::configuration(&self.world, from)
    }

    /// What becomes of a request.
    ///
    /// # Errors
    /// If the question does not make sense, or a proxy would refuse its configuration.
    pub fn ask(&self, question: &Question) -> Result<Answer, Error> {
        walk::walk(&self.world, question)
    }
}
