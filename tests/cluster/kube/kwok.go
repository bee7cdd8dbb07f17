package main

import (
	"context"
	"flag"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
	nodefast "sigs.k8s.io/kwok/kustomize/stage/node/fast"
	podfast "sigs.k8s.io/kwok/kustomize/stage/pod/fast"
	"sigs.k8s.io/kwok/pkg/apis/internalversion"
	"sigs.k8s.io/kwok/pkg/client/clientset/versioned"
	"sigs.k8s.io/kwok/pkg/config"
	"sigs.k8s.io/kwok/pkg/kwok/controllers"
	"sigs.k8s.io/kwok/pkg/utils/client"
)

// A fake pod runs until a test says how it ends, by this annotation with the value Succeeded or Failed.
const podFinished = `
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-finished}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
    - {key: .status.phase, operator: In, values: [Running]}
    - {key: '.metadata.annotations["finetune.dev/fake-result"]', operator: In, values: [Succeeded, Failed]}
  next:
    statusTemplate: |
      {{ $now := Now }}
      {{ $root := . }}
      {{ $result := index .metadata.annotations "finetune.dev/fake-result" }}
      containerStatuses:
      {{ range $index, $item := .spec.containers }}
      - image: {{ $item.image | Quote }}
        name: {{ $item.name | Quote }}
        ready: false
        restartCount: 0
        started: false
        state:
          terminated:
            exitCode: {{ if eq $result "Succeeded" }}0{{ else }}1{{ end }}
            finishedAt: {{ $now | Quote }}
            reason: {{ if eq $result "Succeeded" }}Completed{{ else }}Error{{ end }}
            startedAt: {{ $now | Quote }}
      {{ end }}
      phase: {{ $result }}
`

// runKwok is KWOK's controller over the nodes annotated kwok.x-k8s.io/node: they are Ready and hold their leases, and
// pods bound to them run, without a kubelet.
func runKwok() int {
	kubeconfig := flag.String("kubeconfig", "", "kubeconfig of an administrator")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := startKwok(ctx, *kubeconfig); err != nil {
		klog.ErrorS(err, "cannot start KWOK")
		return 1
	}
	<-ctx.Done()
	return 0
}

func startKwok(ctx context.Context, kubeconfig string) error {
	stages, err := readStages()
	if err != nil {
		return err
	}
	clients, err := client.NewClientset("", kubeconfig)
	if err != nil {
		return err
	}
	restConfig, err := clients.ToRESTConfig()
	if err != nil {
		return err
	}
	dynamicClient, err := clients.ToDynamicClient()
	if err != nil {
		return err
	}
	mapper, err := clients.ToRESTMapper()
	if err != nil {
		return err
	}
	restClient, err := rest.RESTClientFor(restConfig)
	if err != nil {
		return err
	}
	controller, err := controllers.NewController(controllers.Config{
		Clock:                             clock.RealClock{},
		DynamicClient:                     dynamicClient,
		RESTClient:                        restClient,
		RESTMapper:                        mapper,
		ImpersonatingDynamicClient:        clients.ToImpersonatingDynamicClient(),
		ImpersonatingTypedClient:          clients.ToImpersonatingTypedClient(),
		TypedClient:                       kubernetes.NewForConfigOrDie(restConfig),
		TypedKwokClient:                   versioned.NewForConfigOrDie(restConfig),
		ManageNodesWithAnnotationSelector: "kwok.x-k8s.io/node=fake",
		CIDR:                              "100.64.0.0/16",
		NodeIP:                            "100.127.0.1",
		LocalStages:                       stages,
		PodPlayStageParallelism:           4,
		NodePlayStageParallelism:          4,
		NodeLeaseParallelism:              4,
		NodeLeaseDurationSeconds:          40,
		PodsOnNodeSyncParallelism:         4,
		ID:                                "embedded",
	})
	if err != nil {
		return err
	}
	return controller.Start(ctx)
}

func readStages() (map[internalversion.StageResourceRef][]*internalversion.Stage, error) {
	stages := map[internalversion.StageResourceRef][]*internalversion.Stage{}
	for _, text := range []string{
		nodefast.DefaultNodeInit, podfast.DefaultPodReady, podfast.DefaultPodDelete, podFinished,
	} {
		stage, err := config.UnmarshalWithType[*internalversion.Stage](text)
		if err != nil {
			return nil, err
		}
		stages[stage.Spec.ResourceRef] = append(stages[stage.Spec.ResourceRef], stage)
	}
	return stages, nil
}
