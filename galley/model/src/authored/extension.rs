//! `extensions.istio.io` WasmPlugin and TrafficExtension: code of users in the proxy.

use super::{LabelSelector, PolicyTargetReference, PortSelector, WorkloadMode};

message! {
    /// A WebAssembly filter.
    pub struct WasmPlugin {
        /// Workloads of its namespace; none is the namespace, in the root namespace the mesh.
        pub selector: Option<LabelSelector>,
        /// One resource, instead of a selector (old form).
        pub target_ref: Option<PolicyTargetReference>,
        /// Resources, instead of a selector.
        pub target_refs: Vec<PolicyTargetReference>,
        /// Where the module is: `oci://`, `http(s)://`, `file://`, or an image name.
        pub url: String,
        /// SHA-256 of the module in hex.
        pub sha256: String,
        /// When it is fetched.
        pub image_pull_policy: PullPolicy,
        /// Secret for the registry.
        pub image_pull_secret: String,
        /// Key that its signature is verified with.
        pub verification_key: String,
        /// Configuration of the plugin.
        pub plugin_config: Option<serde_json::Value>,
        /// Name of the plugin inside of the module.
        pub plugin_name: String,
        /// Where among the other filters.
        pub phase: PluginPhase,
        /// Order among plugins of a phase, higher first.
        pub priority: Option<i32>,
        /// What happens when it cannot run.
        pub fail_strategy: FailStrategy,
        /// The machine it runs in.
        pub vm_config: Option<VmConfig>,
        /// Traffic it sees; none is all.
        #[serde(rename = "match")]
        pub matches: Vec<TrafficSelector>,
        /// Kind of filter.
        #[serde(rename = "type")]
        pub plugin_type: PluginType,
    }

    /// A filter of WebAssembly or Lua.
    pub struct TrafficExtension {
        /// Workloads of its namespace; none is the namespace, in the root namespace the mesh.
        pub selector: Option<LabelSelector>,
        /// Resources, instead of a selector.
        pub target_refs: Vec<PolicyTargetReference>,
        /// Where among the other filters.
        pub phase: PluginPhase,
        /// Order among extensions of a phase, higher first.
        pub priority: Option<i32>,
        /// Traffic it sees; none is all.
        #[serde(rename = "match")]
        pub matches: Vec<TrafficSelector>,
        /// A WebAssembly module; or `lua`.
        pub wasm: Option<WasmConfig>,
        /// A Lua script; or `wasm`.
        pub lua: Option<LuaConfig>,
    }

    /// A WebAssembly module.
    pub struct WasmConfig {
        /// Where the module is.
        pub url: String,
        /// SHA-256 of the module in hex.
        pub sha256: String,
        /// When it is fetched.
        pub image_pull_policy: PullPolicy,
        /// Secret for the registry.
        pub image_pull_secret: String,
        /// Key that its signature is verified with.
        pub verification_key: String,
        /// Configuration of the plugin.
        pub plugin_config: Option<serde_json::Value>,
        /// Name of the plugin inside of the module.
        pub plugin_name: String,
        /// What happens when it cannot run.
        pub fail_strategy: FailStrategy,
        /// The machine it runs in.
        pub vm_config: Option<VmConfig>,
        /// Kind of filter.
        #[serde(rename = "type")]
        pub plugin_type: PluginType,
    }

    /// A Lua script.
    pub struct LuaConfig {
        /// Its text.
        pub inline_code: String,
    }

    /// The machine a module runs in.
    pub struct VmConfig {
        /// Environment.
        pub env: Vec<EnvVar>,
    }

    /// A variable of the environment.
    pub struct EnvVar {
        /// Name.
        pub name: String,
        /// Where its value comes from.
        pub value_from: EnvValueSource,
        /// Its value if that is inline.
        pub value: String,
    }

    /// Traffic that an extension sees.
    pub struct TrafficSelector {
        /// Side of the traffic.
        pub mode: WorkloadMode,
        /// Ports; none is all.
        pub ports: Vec<PortSelector>,
    }
}

choice! {
    /// Where among the other filters.
    pub enum PluginPhase {
        /// The end.
        #[default]
        UnspecifiedPhase,
        /// Before authentication.
        Authn,
        /// Before authorization.
        Authz,
        /// Before statistics.
        Stats,
        /// The end, by the newer kind's name.
        Unspecified,
    }

    /// What happens when a plugin cannot run.
    pub enum FailStrategy {
        /// Requests are refused.
        #[default]
        FailClose,
        /// Requests pass.
        FailOpen,
        /// It is started again.
        FailReload,
    }

    /// Kind of filter.
    pub enum PluginType {
        /// HTTP.
        #[default]
        UnspecifiedPluginType,
        /// HTTP.
        Http,
        /// Network.
        Network,
    }

    /// Where a variable's value comes from.
    pub enum EnvValueSource {
        /// From the document.
        #[default]
        Inline,
        /// From the proxy's environment.
        Host,
    }
}

/// When a module is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
pub enum PullPolicy {
    /// By the tag of the image.
    #[default]
    #[serde(rename = "UNSPECIFIED_POLICY")]
    Unspecified,
    /// Unless it is there.
    IfNotPresent,
    /// Always.
    Always,
}
