// Command kube is every Go program of the embedded cluster in one binary: the five Kubernetes
// components, CoreDNS with the plugins that a pod needs, and the volume provisioner.
// One binary means one dependency graph to compile and one link. The first argument picks the program.
package main

import (
	"context"
	"fmt"
	"os"
	"sort"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	programs := map[string]func() int{
		"kube-apiserver":          component(apiserver.NewAPIServerCommand),
		"kube-controller-manager": component(controllermanager.NewControllerManagerCommand),
		"kube-scheduler":          component(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
		"kube-proxy":              component(proxy.NewProxyCommand),
		"kubelet":                 component(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }),
		"coredns":                 runCoreDNS,
		"discovery":               runDiscovery,
		"provisioner":             runProvisioner,
		"kwok":                    runKwok,
	}
	var chosen func() int
	if len(os.Args) > 1 {
		chosen = programs[os.Args[1]]
	}
	if chosen == nil {
		fmt.Fprintf(os.Stderr, "usage: kube PROGRAM [flags]; programs: %s\n", strings.Join(sortedNames(programs), ", "))
		os.Exit(2)
	}
	os.Args = os.Args[1:]
	os.Exit(chosen())
}

func component(newCommand func() *cobra.Command) func() int {
	return func() int { return cli.Run(newCommand()) }
}

func sortedNames(programs map[string]func() int) []string {
	names := make([]string, 0, len(programs))
	for name := range programs {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}
