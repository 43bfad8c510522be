// kube-apiserver as it is released, built from the Go module registry.
//
// Inside its own repository the staging modules are directories; here go.mod replaces each with its published version.
package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() {
	os.Exit(cli.Run(app.NewAPIServerCommand()))
}
