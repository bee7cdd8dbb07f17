package main

import (
	"context"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/informers"
	"k8s.io/klog/v2"
)

// growClaims gives claims on our volumes the larger size they ask for. A folder needs nothing for that; a limited
// volume's tmpfs is remounted larger under the pods that use it.
func growClaims(ctx context.Context, f *folders) {
	factory := informers.NewSharedInformerFactory(f.client, time.Minute)
	claims := factory.Core().V1().PersistentVolumeClaims()
	lister := claims.Lister()
	claims.Informer()
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	wait.UntilWithContext(ctx, func(ctx context.Context) {
		all, err := lister.List(labels.Everything())
		if err != nil {
			return
		}
		for _, claim := range all {
			if wanted := claim.Spec.Resources.Requests[corev1.ResourceStorage]; claim.Status.Phase ==
				corev1.ClaimBound && wanted.Cmp(claim.Status.Capacity[corev1.ResourceStorage]) > 0 {
				if err := f.grow(ctx, claim.DeepCopy()); err != nil {
					klog.ErrorS(err, "cannot grow", "claim", klog.KObj(claim))
				}
			}
		}
	}, time.Second)
}

func (f *folders) grow(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	volume, err := f.client.CoreV1().PersistentVolumes().Get(ctx, claim.Spec.VolumeName, metav1.GetOptions{})
	if err != nil || volume.Annotations["pv.kubernetes.io/provisioned-by"] != provisionerName {
		return err
	}
	wanted := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	if volume.Annotations[provisionerName+"-limited"] == "true" {
		if err := mountLimited(volume.Spec.Local.Path, wanted.Value(), syscall.MS_REMOUNT); err != nil {
			return err
		}
	}
	volume.Spec.Capacity[corev1.ResourceStorage] = wanted
	if _, err := f.client.CoreV1().PersistentVolumes().Update(ctx, volume, metav1.UpdateOptions{}); err != nil {
		return err
	}
	claim.Status.Capacity[corev1.ResourceStorage] = wanted
	claim.Status.Conditions = nil
	_, err = f.client.CoreV1().PersistentVolumeClaims(claim.Namespace).UpdateStatus(ctx, claim, metav1.UpdateOptions{})
	return err
}
