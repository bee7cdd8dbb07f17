package main

import (
	"context"
	"encoding/json"
	"flag"
	"net"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

const annotation = "prometheus.io/"

// targetGroup is one element of Prometheus' HTTP service discovery format.
type targetGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// runDiscovery answers Prometheus' HTTP service discovery with the running pods that are annotated
// prometheus.io/scrape, port, path and scheme: Debian's Prometheus is built without Kubernetes discovery.
func runDiscovery() int {
	kubeconfig := flag.String("kubeconfig", "", "kubeconfig of an administrator")
	address := flag.String("address", "127.0.0.1:9091", "host:port to listen on")
	flag.Parse()
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		klog.ErrorS(err, "cannot read the kubeconfig", "path", *kubeconfig)
		return 1
	}
	factory := informers.NewSharedInformerFactory(kubernetes.NewForConfigOrDie(config), 10*time.Minute)
	pods := factory.Core().V1().Pods().Lister()
	factory.Core().V1().Pods().Informer()
	factory.Start(context.Background().Done())
	http.HandleFunc("/pods", func(answer http.ResponseWriter, _ *http.Request) {
		answer.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(answer).Encode(listTargets(pods)); err != nil {
			klog.ErrorS(err, "cannot answer")
		}
	})
	klog.ErrorS(http.ListenAndServe(*address, nil), "cannot serve", "address", *address)
	return 1
}

func listTargets(pods listers.PodLister) []targetGroup {
	groups := []targetGroup{}
	all, err := pods.List(labels.Everything())
	if err != nil {
		return groups
	}
	for _, pod := range all {
		port := pod.Annotations[annotation+"port"]
		if pod.Annotations[annotation+"scrape"] != "true" || port == "" || pod.Status.Phase != corev1.PodRunning {
			continue
		}
		groups = append(groups, targetGroup{
			Targets: []string{net.JoinHostPort(pod.Status.PodIP, port)},
			Labels:  buildTargetLabels(pod),
		})
	}
	return groups
}

func buildTargetLabels(pod *corev1.Pod) map[string]string {
	found := map[string]string{"namespace": pod.Namespace, "pod": pod.Name}
	for name, label := range map[string]string{"path": "__metrics_path__", "scheme": "__scheme__"} {
		if value := pod.Annotations[annotation+name]; value != "" {
			found[label] = value
		}
	}
	for name, label := range map[string]string{"finetune.dev/job": "finetune_job", "finetune.dev/component": "finetune_component"} {
		if value := pod.Labels[name]; value != "" {
			found[label] = value
		}
	}
	return found
}
