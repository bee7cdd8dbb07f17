package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

const provisionerName = "finetune.dev/local"

// folders provisions `local` volumes (which, unlike hostPath, honour fsGroup) as folders under one root.
// StorageClass parameters: `limited: "true"` puts a tmpfs of the claimed size behind the volume, so that it can
// run full; `topology: zone` ties the volume to its node's zone, as a cloud disk is, instead of to the node.
type folders struct {
	root   string
	client kubernetes.Interface
}

func runProvisioner() int {
	kubeconfig := flag.String("kubeconfig", "", "kubeconfig of an administrator")
	root := flag.String("root", "", "folder that holds the volumes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		klog.ErrorS(err, "cannot read the kubeconfig", "path", *kubeconfig)
		return 1
	}
	client := kubernetes.NewForConfigOrDie(config)
	provisioner := &folders{root: *root, client: client}
	go growClaims(ctx, provisioner)
	controller.NewProvisionController(ctx, client, provisionerName, provisioner,
		controller.LeaderElection(false)).Run(ctx)
	return 0
}

func (f *folders) Provision(
	ctx context.Context, options controller.ProvisionOptions,
) (*corev1.PersistentVolume, controller.ProvisioningState, error) {
	node, err := f.client.CoreV1().Nodes().Get(ctx, options.SelectedNodeName, metav1.GetOptions{})
	if err != nil {
		return nil, controller.ProvisioningFinished, fmt.Errorf("node %q: %w", options.SelectedNodeName, err)
	}
	size := options.PVC.Spec.Resources.Requests[corev1.ResourceStorage]
	path := filepath.Join(f.root, options.PVName)
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	limited := options.StorageClass.Parameters["limited"] == "true"
	if limited {
		if err := mountLimited(path, size.Value(), 0); err != nil {
			return nil, controller.ProvisioningFinished, err
		}
	}
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{
			Name:        options.PVName,
			Annotations: map[string]string{provisionerName + "-limited": fmt.Sprint(limited)},
		},
		Spec: corev1.PersistentVolumeSpec{
			AccessModes:                   options.PVC.Spec.AccessModes,
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: size},
			PersistentVolumeReclaimPolicy: *options.StorageClass.ReclaimPolicy,
			PersistentVolumeSource: corev1.PersistentVolumeSource{
				Local: &corev1.LocalVolumeSource{Path: path},
			},
			NodeAffinity: buildAffinity(node, options.StorageClass.Parameters["topology"] == "zone"),
		},
	}, controller.ProvisioningFinished, nil
}

// Delete runs only for volumes whose reclaim policy is Delete.
func (f *folders) Delete(_ context.Context, volume *corev1.PersistentVolume) error {
	path := volume.Spec.Local.Path
	if filepath.Dir(path) != filepath.Clean(f.root) {
		return fmt.Errorf("volume %s lies at %s, outside %s: not deleting it", volume.Name, path, f.root)
	}
	if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) &&
		!errors.Is(err, syscall.ENOENT) {
		return err
	}
	return os.RemoveAll(path)
}

func mountLimited(path string, size int64, flags uintptr) error {
	return syscall.Mount("tmpfs", path, "tmpfs", flags, fmt.Sprintf("size=%d,mode=755", size))
}

func buildAffinity(node *corev1.Node, byZone bool) *corev1.VolumeNodeAffinity {
	key := corev1.LabelHostname
	if byZone && node.Labels[corev1.LabelTopologyZone] != "" {
		key = corev1.LabelTopologyZone
	}
	return &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{
			{Key: key, Operator: corev1.NodeSelectorOpIn, Values: []string{node.Labels[key]}},
		}}},
	}}
}
